"""Fused loops: an element-wise method's plain torch function, compiled for this machine and kept.

trace.py    a function becomes a list of typed operations on one element
source.py   the operations become a loop in C++, for the processor, or a CUDA kernel
device.py   builds the kernel for a CUDA device
run.py      runs the function on windows, as a loop or operation by operation, with the same bytes

`mergecore.native.library` builds, keeps and loads the loops.
"""
