"""What a launch sets in the environment is gone when it is over: a later run decides for itself."""

import os

from sslscale.pretrain.launch import _environment


def test_switches_are_set_where_the_user_has_not_and_only_for_the_block(monkeypatch):
    monkeypatch.setenv("SSLSCALE_TEST_SET", "by the user")
    monkeypatch.delenv("SSLSCALE_TEST_FREE", raising=False)
    with _environment({"SSLSCALE_TEST_SET": "ours", "SSLSCALE_TEST_FREE": "ours"}):
        assert os.environ["SSLSCALE_TEST_SET"] == "by the user"
        assert os.environ["SSLSCALE_TEST_FREE"] == "ours"
    assert os.environ["SSLSCALE_TEST_SET"] == "by the user"
    assert "SSLSCALE_TEST_FREE" not in os.environ
