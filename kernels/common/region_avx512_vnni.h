// Opens a region whose functions may use what torch_cpu_ext/core/isa.py calls "avx512_vnni". Comes after all includes, outside namespaces.
#if defined(__clang__)
#pragma clang attribute push(                                                                                                           \
    __attribute__((                                                                                                                     \
        target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,avx512vpopcntdq"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,avx512vpopcntdq,prefer-vector-width=512")
#endif
