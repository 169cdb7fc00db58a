"""Measurements of a call: time on the host, time on the device, a CUDA graph of many calls, and peak memory."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

FAILED: list[torch.cuda.CUDAGraph] = []  # graphs whose capture failed: torch's allocator still refers to them


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def host_seconds(work: Callable[[], Any], device: str) -> float:
    sync(device)
    begun = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - begun


def event_seconds(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Capture all calls in one CUDA graph. Their results stay alive until the end, so each writes to its own memory.

    Raises RuntimeError if a call waits for the host. A trial call detects such a wait before the capture begins. If the
    capture itself fails, torch's generator and current stream are restored. Otherwise the next random number would
    raise an error.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    untouched = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            kept = [once() for once in calls]
    except RuntimeError:
        FAILED.append(graph)
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(untouched)
        raise
    del kept
    return graph


def peak_growth(work: Callable[[], Any], device: str) -> int:
    """Return the peak bytes that torch's allocators hold during one call, beyond the bytes that were live before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    results: Any = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return peak


def lost(device: str) -> str:
    """Return why the device no longer answers, or "" if it answers.

    No later call in this process can use a lost device.
    """
    try:
        sync(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
