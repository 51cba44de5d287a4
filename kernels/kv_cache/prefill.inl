// The body of prefill.h, for every instruction set.
