"""
What the library does on an accelerator, seen without one.

``device.cpp`` makes a device of torch out of the memory of the CPU. It finds what only the code for
accelerators gets wrong: operands on two devices, digits lost on the way there, questions that the
host waits for. How fast anything is, or what the kernels of CUDA round to, it does not tell. It
takes a C++ compiler and half a minute to be built: ``tox -e standin``.
"""
