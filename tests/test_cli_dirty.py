"""The command dirty: what it tells people and programs, when it ends, and that the log ends too."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from cli_runner import run, run_process, start, wait_for
from vfiomig.simulator.device import SimulatedOps

QUICK = ["--interval", "1ms", "--count", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_programs_get_each_report_and_the_result_last() -> None:
    ranges = ["--range", "0x100000:64K", "--range", "4G:0x10000", "--map"]
    found = run("dirty", "sim:?dma_writes=3", *ranges, *QUICK, "--json")
    *reports, result = found.documents
    assert (found.code, [report["type"] for report in reports]) == (0, ["report"] * 2)
    assert [report["number"] for report in reports] == [1, 2]
    for report in reports:
        assert (report["page_size"], report["dirty_pages"], report["dirty_bytes"]) == (
            4096,
            3,
            12288,
        )
        assert sum(length for _, length in report["ranges"]) == 12288
        assert report["bytes_per_s"] == 12288 * 10**9 // report["interval_ns"]
        assert (report["is_everything"], report["errno"]) == (False, None)
    assert result["logged"] == [[0x100000, 65536], [4 << 30, 65536]]
    assert (result["logged_pages"], result["device_page_size"]) == (32, 4096)
    assert (result["reports"], result["dirty_pages"], result["distinct_pages"]) == (2, 6, 6)
    assert sum(length for _, length in result["ranges"]) == 6 * 4096
    assert result["pages_per_s"] > 0
    assert result["bytes_per_s"] >= 4096 * result["pages_per_s"]


def test_pages_that_were_dirty_before_are_counted_once_as_distinct() -> None:
    found = run("dirty", "sim:?dma_writes=4", "--range", "0:16K", *QUICK, "--json").last
    assert (found["dirty_pages"], found["distinct_pages"]) == (8, 4)
    assert (found["range_count"], found["ranges"]) == (1, [[0, 16384]])


def test_distinct_pages_are_left_out_where_they_would_take_much_memory() -> None:
    found = run("dirty", "sim:", "--range", "0:300G", "--interval", "1ms", "--count", "1", "--json")
    assert found.last["distinct_pages"] is None
    assert found.last["ranges"] is None
    assert found.last["dirty_pages"] == 0


def test_people_get_a_line_for_each_report_and_what_they_come_to() -> None:
    found = run("dirty", "sim:?dma_writes=16", "--range", "1M:1M", *QUICK)
    lines = found.out.splitlines()
    assert lines[0].split()[:4] == ["time", "pages", "dirty", "rate"]
    assert [line.split()[2] for line in lines[1:3]] == ["16", "16"]
    assert "  logged   1 MiB in 1 range, pages of 4 KiB" in lines
    assert "  distinct  32 pages, 128 KiB, in " in found.out
    assert "0x100000:" in found.out
    assert found.err == ""


def test_ranges_are_listed_up_to_a_screen_unless_all_are_asked_for() -> None:
    words = ["dirty", "sim:?dma_writes=400", "--range", "0:1G", *QUICK]
    some, everything = run(*words), run(*words, "--all")
    assert "and 80 more: --all" in some.out
    assert len(everything.out.splitlines()) == len(some.out.splitlines()) - 1 + 80
    as_json = run(*words, "--json").last
    assert (as_json["range_count"], len(as_json["ranges"])) == (100, 20)
    assert len(run(*words, "--json", "--all").last["ranges"]) == 100


def test_the_map_lists_the_ranges_of_each_report() -> None:
    words = ["dirty", "sim:?dma_writes=160", "--range", "0:1G", *QUICK]
    with_map = run(*words, "--map")
    assert len(with_map.out.splitlines()) == len(run(*words).out.splitlines()) + 2 * 20
    reports = run(*words, "--json").documents[:2]
    assert [(report["ranges"], report["range_count"]) for report in reports] == [(None, 20)] * 2


def test_quiet_leaves_the_result_alone() -> None:
    found = run("dirty", "sim:", "--range", "0:4K", *QUICK, "-q")
    assert found.out.startswith("sim:\n")


def test_reports_are_in_the_pages_of_the_device() -> None:
    words = ["--range", "0:4M", "--page-size", "4M", *QUICK, "--json"]
    found = run("dirty", "sim:?profile=mlx5&dma_writes=1", *words).last
    assert (found["page_size"], found["device_page_size"]) == (2 << 20, 2 << 20)


def test_a_log_that_cannot_be_read_means_that_everything_is_dirty() -> None:
    url = "sim:?fault=log-report:EOPNOTSUPP"
    found = run("dirty", url, "--range", "0:1M", *QUICK, "--json")
    warning, first, second, result = found.documents
    assert found.code == 0
    assert "IOMMUFD_DRIVER" in warning["text"]
    assert (first["dirty_pages"], first["bytes_per_s"], second["errno"]) == (256, None, 95)
    assert (result["is_everything"], result["failed_reports"]) == (True, 2)
    assert (result["pages_per_s"], result["distinct_pages"]) == (None, None)
    assert "IOMMUFD_DRIVER" in result["reason"]
    for_people = run("dirty", url, "--range", "0:1M", *QUICK)
    assert "all memory counts as dirty" in for_people.err
    assert for_people.out.count("everything") == 3


def test_a_report_that_fails_now_and_then_spoils_no_rate() -> None:
    url = "sim:?dma_writes=2&fault=log-report:EIO*1"
    found = run("dirty", url, "--range", "0:1M", *QUICK, "--json").last
    assert (found["failed_reports"], found["dirty_pages"], found["distinct_pages"]) == (1, 2, None)
    assert found["pages_per_s"] > 0


def test_a_duration_ends_it() -> None:
    words = ["--range", "0:1M", "--interval", "1h", "--duration", "20ms", "--json"]
    *reports, result = run("dirty", "sim:?dma_writes=7", *words).documents
    assert len(reports) == 1
    assert result["took_ns"] >= 20_000_000
    assert result["peak_bytes_per_s"] is None  # an interval cut short tells no peak


def test_the_environment_may_name_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOMIG_RANGE", "1M:1M")
    words = ["dirty", "sim:", *QUICK, "--json"]
    assert run(*words).last["logged"] == [[1 << 20, 1 << 20]]
    assert run(*words, "--range", "0:4K").last["logged"] == [[0, 4096]]


def test_what_fails_is_told_and_the_device_is_not_asked_for_more() -> None:
    found = run("dirty", "sim:?fault=log-start:EINVAL", "--range", "0:4K", "--json")
    assert (found.code, found.last["error"], found.last["errno"]) == (5, "DeviceBusyError", 22)
    assert "--restart" in found.last["hint"]
    found = run("dirty", "sim:?fault=log-stop:EIO*1", "--range", "0:4K", *QUICK, "--json")
    assert (found.code, found.last["error"]) == (6, "DeviceIOError")


def test_restart_ends_a_log_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    for call in ("start_dma_logging", "stop_dma_logging"):
        original = getattr(SimulatedOps, call)

        def answer(*arguments: object, name: str = call, done: object = original) -> object:
            asked.append(name.partition("_")[0])
            assert callable(done)
            return done(*arguments)

        monkeypatch.setattr(SimulatedOps, call, answer)
    run("dirty", "sim:", "--range", "0:4K", *QUICK)
    run("dirty", "sim:", "--range", "0:4K", *QUICK, "--restart")
    assert asked == ["start", "stop", "stop", "start", "stop"]


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("limit", "code"), [([], 0), (["--count", "100000"], 1)])
def test_a_signal_ends_it_with_its_result(
    number: signal.Signals, limit: list[str], code: int
) -> None:
    words = ["--range", "0:1M", "--interval", "5ms", *limit, "--json"]
    url = "sim:?dma_writes=1"
    with start("dirty", url, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(process, lambda told: told["type"] == "report" and told["number"] == 2)
        process.send_signal(number)
        result = wait_for(process, lambda told: told["type"] == "result")
        assert process.wait(20) == code * (128 + number)  # short of what it was told to do
        assert process.communicate() == (b"", b"")
    assert result["reports"] >= 3
    assert result["dirty_pages"] == result["reports"]


def test_a_signal_in_a_long_interval_is_not_waited_for() -> None:
    words = ["--range", "0:1M", "--interval", "9999h", "--json"]
    url = "sim:?fault=log-report:EIO*1"
    with start("dirty", url, *words, stdout=subprocess.PIPE) as process:
        while not in_poll(process.pid):
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        assert wait_for(process, lambda told: told["type"] == "result")["reports"] == 1
        assert process.wait(20) == 0


def in_poll(pid: int) -> bool:
    """Whether a process has a second thread, which waits for the end of the interval."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) == 2
    except FileNotFoundError:
        return False


def test_a_reader_that_goes_away_ends_it() -> None:
    words = ["--range", "0:1M", "--interval", "1ms", "--json"]
    with start("dirty", "sim:", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 128 + signal.SIGPIPE


def test_a_simulated_device_in_a_file_is_free_afterwards() -> None:
    code, out, err = run_process("dirty", "sim:a?size=1", "--range", "0:1M", *QUICK)
    assert (code, err) == (0, b"")
    assert b"distinct  0 pages" in out
    assert run("state", "sim:a").code == 0
