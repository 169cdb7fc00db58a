"""The fastest path of lora_linear where it was measured. Written by `python -m burnish.bench paths`.

Nothing has been measured yet: every device takes F.linear, then addmm.
"""

SOURCES: dict[str, str] = {}  # device -> the results that it was read from

# (device, dtype, M, N, K, R) -> path; M stands for up to twice as many rows
PATHS: dict[tuple[str, str, int, int, int, int], str] = {}
