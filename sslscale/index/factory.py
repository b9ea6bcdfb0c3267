"""faiss indexes of any factory string: made empty, merged, and searched with their own parameters.

Rows are compared by squared L2 (under "cosine" they are of unit length, see features.distance), and an index numbers
them by the order in which they came: what its numbers mean is kept beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from sslscale.errors import UserError

REFUSED = {
    faiss.IndexIDMap: "row ids are kept beside the index",
    faiss.IndexIVFFlatDedup: "vectors that repeat have no place of their own in it: sslscale dedup finds them",
    faiss.IndexNSG: "it takes all rows at once: use HNSW",
}


@dataclass(frozen=True)
class Effort:
    """How hard an index looks: faiss's parameters, None where the index has no such.

    `k_factor` times k candidates by code are ranked again by a refining index.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    k_factor: int | None = None


def empty_index(factory: str, dim: int) -> faiss.Index:
    """An untrained index for rows of `dim` dimensions; UserError where faiss does not understand the string."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_L2)
        reason = next((why for kind, why in REFUSED.items() if isinstance(layers(index)[-1], kind)), None)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
    if reason is None:
        return index
    raise UserError(
        "this factory string cannot be used",
        got=f"{factory!r} for {dim} dimensions: {reason}",
        allowed="auto, or a string such as Flat, IVF1024,Flat, HNSW32 or OPQ16_64,IVF1024,PQ16",
        fix="set index.factory",
    )


def layers(index: faiss.Index) -> list[faiss.Index]:
    """The index, what it wraps, and so on inwards, each as its own class."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return [index, *layers(index.base_index)]
    if isinstance(index, faiss.IndexPreTransform):
        return [index, *layers(index.index)]
    return [index]


def inverted_lists(index: faiss.Index) -> Any | None:
    """The IndexIVF in it, if any."""
    core = layers(index)[-1]
    return core if isinstance(core, faiss.IndexIVF) else None


def can_merge(index: faiss.Index) -> bool:
    """Whether indexes that were filled apart can become one; graphs cannot."""
    return isinstance(layers(index)[-1], faiss.IndexIVF | faiss.IndexFlatCodes)


def is_streamable(index: faiss.Index) -> bool:
    """Whether all it holds is inverted lists of codes, one after the other: then they are merged file to file."""
    lists = inverted_lists(index)
    plain = faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ  # others hold more beside their lists
    if lists is None or type(lists) not in plain or isinstance(layers(index)[0], faiss.IndexRefine):
        return False
    return isinstance(faiss.downcast_InvertedLists(lists.invlists), faiss.ArrayInvertedLists)


def merge(into: faiss.Index, other: faiss.Index) -> None:
    """Moves the rows of `other` behind those of `into`; both were trained as one."""
    target, source = faiss.downcast_index(into), faiss.downcast_index(other)
    if isinstance(target, faiss.IndexRefine):
        merge(target.base_index, source.base_index)
        merge(target.refine_index, source.refine_index)
        target.ntotal = target.base_index.ntotal
    elif isinstance(target, faiss.IndexPreTransform):
        merge(target.index, source.index)
        target.ntotal = target.index.ntotal
    elif isinstance(target, faiss.IndexIVF):
        target.merge_from(source, target.ntotal)
    else:
        target.merge_from(source)


def bytes_per_vector(index: faiss.Index) -> float:
    """Memory that a vector takes: its codes, its id in a list, its neighbours in a graph."""
    total = 0.0
    for layer in layers(index):
        if isinstance(layer, faiss.IndexRefine):
            total += faiss.downcast_index(layer.refine_index).sa_code_size()
        elif isinstance(layer, faiss.IndexIVF):
            total += layer.code_size + 8
        elif isinstance(layer, faiss.IndexHNSW):
            links = 4 * layer.hnsw.nb_neighbors(0) + 4 + 8  # the lowest level, the number of levels, the offset
            total += faiss.downcast_index(layer.storage).sa_code_size() + 1.1 * links  # about a tenth stand higher up
        elif not isinstance(layer, faiss.IndexPreTransform):
            total += layer.sa_code_size()
    return total


def fixed_bytes(index: faiss.Index) -> int:
    """Memory that an index takes before any vector: the centroids of its lists, and the graph over them."""
    lists = inverted_lists(index)
    if lists is None:
        return 0
    graph = isinstance(faiss.downcast_index(lists.quantizer), faiss.IndexHNSW)
    return lists.nlist * (4 * lists.d + (300 if graph else 0) + 100)


def starting_effort(index: faiss.Index) -> Effort:
    """The least effort of an index, with None for what it does not have."""
    own = layers(index)
    return Effort(
        nprobe=1 if isinstance(own[-1], faiss.IndexIVF) else None,
        ef_search=10 if isinstance(own[-1], faiss.IndexHNSW) else None,
        k_factor=1 if isinstance(own[0], faiss.IndexRefine) else None,
    )


def takes_parameters(index: faiss.Index) -> bool:
    """Whether a search can be given parameters; some indexes take none."""
    return isinstance(layers(index)[0], faiss.IndexRefine) or _core_takes(index)


def _core_takes(index: faiss.Index) -> bool:
    takes = faiss.IndexIVF | faiss.IndexHNSW | faiss.IndexFlat | faiss.IndexScalarQuantizer
    return isinstance(layers(index)[-1], takes)


def takes_selector(index: faiss.Index) -> bool:
    """Whether a search can be told which rows count; others are compared one by one."""
    deaf = faiss.IndexIVFPQR | faiss.IndexIVFAdditiveQuantizer | faiss.IndexIVFSpectralHash
    return _core_takes(index) and not isinstance(layers(index)[-1], deaf)


def search_parameters(
    index: faiss.Index, effort: Effort, selector: faiss.IDSelector | None = None
) -> faiss.SearchParameters:
    """What `index.search(params=)` takes, through every layer; the selector picks the rows that count."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        base = index.base_index
        inner = {"base_index_params": search_parameters(base, effort, selector)} if _core_takes(base) else {}
        return faiss.IndexRefineSearchParameters(k_factor=float(effort.k_factor or 1), **inner)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(index.index, effort, selector))
    only = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=effort.nprobe, **only)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort.ef_search, **only)
    return faiss.SearchParameters(**only)


def selector_of(mask: np.ndarray) -> faiss.IDSelector:
    """The rows for which `mask` (N,) is true."""
    return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))


def nearest_lists(index: faiss.Index, x: np.ndarray, count: int) -> np.ndarray:
    """(n, count) int64: the lists of an IndexIVF whose centroids are nearest to each row of x; -1 where none is."""
    for layer in layers(index):
        if isinstance(layer, faiss.IndexPreTransform):
            for at in range(layer.chain.size()):
                x = faiss.downcast_VectorTransform(layer.chain.at(at)).apply(x)
    return faiss.downcast_index(layers(index)[-1].quantizer).search(x, count)[1]


def rows_of_list(lists: faiss.IndexIVF, number: int) -> np.ndarray:
    """The numbers of the vectors in an inverted list, as a view of its memory."""
    return faiss.rev_swig_ptr(lists.invlists.get_ids(number), lists.invlists.list_size(number))


# ------------------------------------------------------------------ GPUs


def use_gpus(device: str) -> bool:
    """Whether to compute on GPUs, for "auto", "cpu" or "cuda"; UserError for the last where faiss sees none."""
    found = faiss.get_num_gpus() > 0
    if device == "cuda" and not found:
        raise UserError(
            "faiss sees no GPU", fix="pip install 'sslscale[gpu]' on a machine with CUDA, or leave the device at auto"
        )
    return found and device != "cpu"


def train(index: faiss.Index, rows: np.ndarray, device: str) -> None:
    """`index.train`, with the lists' centroids found on all GPUs where they are used."""
    lists = inverted_lists(index)
    if lists is not None and use_gpus(device):
        lists.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(lists.d))
    index.train(rows)


def on_gpu(index: faiss.Index) -> faiss.Index:
    """A copy on the first GPU that this process sees; UserError for an index that faiss has no GPU code for."""
    use_gpus("cuda")
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            "this index cannot be searched on a GPU",
            got=reason,
            allowed="Flat, or inverted lists with Flat, SQ or PQ codes",
            fix="leave the device at cpu, or build another index.factory",
        ) from None
