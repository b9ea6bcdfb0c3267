"""What a training asks of the corpus between its steps, by the code of the later stages.

Ranks are handed these functions before they are known to be needed, so the imports wait until they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sslscale.pretrain.corpus import CorpusTools

if TYPE_CHECKING:
    import numpy as np

RESTARTS = 5


def neighbours(features: np.ndarray, rows: slice, k: int) -> np.ndarray:
    """The exact k nearest others by cosine of the rows (n', D) of features (n, D): places, int64 (n', k)."""
    import numpy as np

    from sslscale.index.exact import ArrayReference, exact_knn

    own = np.arange(rows.start, rows.stop)
    return exact_knn(features[rows], own, ArrayReference(features), k, "cosine")[1]


def centroids(features: np.ndarray, num_clusters: int, seed: int, threads: int) -> np.ndarray:
    """K-means centroids (K, D) of features (n, D). UserError where K > n."""
    from sslscale.cluster.kmeans import KMeans

    kmeans = KMeans(num_clusters, num_init=RESTARTS, threads=threads, random_state=seed)
    return kmeans.fit(features).cluster_centers_


TOOLS = CorpusTools(neighbours, centroids)
