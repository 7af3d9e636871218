// libstdc++'s headers read this variable of glibc 2.32 to skip atomic operations while a process has one thread.
// Defined here it is always 0, and the library loads beside an older glibc too. See cmake/glibc.cmake.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
