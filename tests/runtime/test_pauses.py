import gc

from pipeinfer_dask.runtime.nodes.pauses import short_collections


def test_what_is_there_is_passed_over_until_the_last_block_ends() -> None:
    before = gc.get_freeze_count()
    with short_collections():
        frozen = gc.get_freeze_count()
        assert frozen > before
        with short_collections():
            assert gc.get_freeze_count() <= frozen
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == before
