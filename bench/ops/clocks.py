"""Clocks of one call: the host's, the device's, a CUDA graph of many calls, and the memory that a call takes."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

FAILED: list[torch.cuda.CUDAGraph] = []  # torch's allocator goes on looking at a graph whose capture failed


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
    """One graph of all calls. Their results stay alive inside it, so that each call writes to memory of its own.

    RuntimeError where a call waits for the host. That is found before a capture begins: one that fails leaves torch's
    generator and its current stream in the capture, and the next random number ends the run.
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
    """Bytes that torch's allocators held at the worst moment of one call, beyond what was live before it."""
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
    held = peak = 0
    for _, nbytes in events:
        held += nbytes
        peak = max(peak, held)
    return peak


def lost(device: str) -> str:
    """Why the device answers no more, which no later call in this process survives; "" where it does."""
    try:
        sync(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
