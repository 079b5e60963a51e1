"""What does not fit into memory is refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pipeinfer_dask.runtime.planning.memory import Need, Pool, check_memory, pools_here

GIB = 1 << 30


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def groups_of(root: Path) -> dict[str, int]:
    """Return what is left in each control group, by its path."""
    _, *groups = pools_here(root)
    return {group.name.split()[2]: group.available for group in groups}


def test_nodes_fit_that_take_all_that_is_free() -> None:
    pools = {"a": [Pool("machine one", 4 * GIB)], "b": [Pool("machine two", GIB)]}
    check_memory([Need("stage 0", "a", 4 * GIB), Need("stage 1", "b", GIB)], pools)


def test_a_worker_that_can_not_hold_its_share_is_named() -> None:
    pools = {"a": [Pool("machine one", 4 * GIB)], "b": [Pool("machine two", GIB)]}
    needs = [Need("stage 0", "a", GIB), Need("stage 1", "b", 2 * GIB)]
    with pytest.raises(MemoryError) as caught:
        check_memory(needs, pools)
    assert str(caught.value) == (
        "expected 2.00 GiB of free memory for stage 1 on b, got 1.00 GiB (machine two): use more "
        "machines or stages, give this one fewer layers by layer_split, or free memory there"
    )


def test_nodes_on_one_worker_and_workers_of_one_machine_are_added_up() -> None:
    machine = Pool("machine one", 4 * GIB)
    pools = {"a": [machine, Pool("limit of a", 3 * GIB)], "b": [machine]}
    fits = [Need("stage 0", "a", GIB), Need("stage 1", "a", 2 * GIB)]
    check_memory(fits, pools)
    with pytest.raises(
        MemoryError, match=r"4\.00 GiB .* for stage 0, stage 1, drafter on a, got 3"
    ):
        check_memory([*fits, Need("drafter", "a", GIB)], pools)
    with pytest.raises(MemoryError, match=r"5\.00 GiB .* drafter on a, b, got 4\.00 GiB \(machine"):
        check_memory([*fits, Need("drafter", "b", 2 * GIB)], pools)


def test_the_machines_own_memory_is_a_pool(tmp_path: Path) -> None:
    (machine,) = pools_here(tmp_path)
    assert 0 < machine.available <= psutil.virtual_memory().total


def test_every_control_group_that_limits_is_a_pool(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/job/step")
    base = tmp_path / "sys/fs/cgroup"
    stat = "anon 5\nactive_file 30\ninactive_file 200"
    write(base / "job/step", memory_max=1000, memory_current=600, memory_stat=stat)
    write(base / "job", memory_max="max", memory_current=600, memory_stat=stat)
    write(base, memory_max=2000, memory_current=1500, memory_stat="anon 1")
    # Files that are only cached make room.
    assert groups_of(tmp_path) == {"/job/step": 630, "/": 500}


def test_control_groups_of_version_1_are_pools(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="3:cpu,cpuacct:/x\n2:memory:/docker/ab")
    # In a container only its own group is there, as the root.
    base = tmp_path / "sys/fs/cgroup/memory"
    write(base, memory_limit_in_bytes=900, memory_usage_in_bytes=100, memory_stat="cache 5")
    assert groups_of(tmp_path) == {"/": 800}
