// The body of attend.h, for every instruction set.
