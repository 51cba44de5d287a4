// The body of select.h, for every instruction set.
