"""Shared parts of the compiled CPU kernels: the build, the library's door, vectors and views."""
