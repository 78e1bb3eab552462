"""Microseconds of torch's FP8 matrix product, torch._scaled_mm with one scale per row, for the shapes on stdin.

Reads and writes lines of M, N, K; the output has the median time as a fourth field.
"""

import statistics
import sys

import torch

LAUNCHES, TIMES = 20, 7

for line in sys.stdin:
    m, n, k = map(int, line.split())
    a = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    a_scales = torch.ones(m, 1, device="cuda")
    b_scales = torch.ones(1, n, device="cuda")

    def launch():
        torch._scaled_mm(a, b.t(), scale_a=a_scales, scale_b=b_scales, out_dtype=torch.bfloat16)

    for _ in range(LAUNCHES):
        launch()
    times = []
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    print(m, n, k, f"{statistics.median(times):.2f}", flush=True)
