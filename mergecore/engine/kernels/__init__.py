"""Fused loops: an element-wise method's plain torch function, compiled for this machine and kept.

trace.py    the function as a list of typed operations on one element
source.py   the operations as one loop in C++, for the processor, or as a CUDA kernel
library.py  built, kept in a folder, loaded
device.py   built for a CUDA device
run.py      called on chunks, fused or eagerly, with the same bytes
"""
