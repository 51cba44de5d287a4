"""The command line `torch-cpu-ext`; needs the extra ``[cli]``, and nothing else in the package needs it."""
