#pragma once
// A row: the kernel template with these arguments under this host name. A macro, because Metal's explicit
// instantiation wants the function twice.
//   INSTANTIATE("decode_gemv_fp4", decode_gemv<FP4, half>)
#define INSTANTIATE(host, ...) template [[host_name(host)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
