// metal-marlin: lanes=any
// Activations, elementwise; a row is `width` outputs.
//
//   activation_<name>        y = act(x), x [rows, width]
//   gated_activation_<name>  y = act(x[:, :width]) * x[:, width:], x [rows, 2 * width]
//
// Computed in float, rounded once. A thread takes `run` outputs of a row, on the CPU a vector loop.
// Rows: <kernel>_<activation>[__t<dtype>]. Grid: x covers the outputs of a row, y = rows; ops/activation.py has the numbers.
#include <metal_stdlib>
#include "core/constants.h"
#include "core/instantiate.h"
#include "policies/activations.h"
using namespace metal;

struct ActivationShape {
    long width;
    long run; // outputs of a threadgroup
};

struct ActivationPlace {
    uint begin, end, stride;
    ActivationPlace(constant ActivationShape& shape, uint group, uint tid, uint threads) {
        begin = group * uint(shape.run) + tid;
        end = min(group * uint(shape.run) + uint(shape.run), uint(shape.width));
        stride = kSimdWidth == 1 ? 1 : threads;
    }
};

template <typename Act, typename T>
[[kernel]] void activation(device const T* x [[buffer(0)]], device T* y [[buffer(1)]],
                           constant ActivationShape& shape [[buffer(2)]],
                           uint2 tgid [[threadgroup_position_in_grid]],
                           uint tid [[thread_index_in_threadgroup]], uint2 size [[threads_per_threadgroup]]) {
    const ActivationPlace at(shape, tgid.x, tid, size.x);
    const ulong row = ulong(tgid.y) * ulong(shape.width);
    for (uint i = at.begin; i < at.end; i += at.stride) y[row + i] = T(Act::of(float(x[row + i])));
}

template <typename Act, typename T>
[[kernel]] void
gated_activation(device const T* x [[buffer(0)]], device T* y [[buffer(1)]],
                 constant ActivationShape& shape [[buffer(2)]], uint2 tgid [[threadgroup_position_in_grid]],
                 uint tid [[thread_index_in_threadgroup]], uint2 size [[threads_per_threadgroup]]) {
    const ActivationPlace at(shape, tgid.x, tid, size.x);
    const uint width = uint(shape.width);
    device const T* gate = x + 2 * ulong(tgid.y) * width;
    device const T* up = gate + width;
    device T* out = y + ulong(tgid.y) * width;
    for (uint i = at.begin; i < at.end; i += at.stride) out[i] = T(Act::of(float(gate[i])) * float(up[i]));
}

#define ROWS(name, kernel, Act)                                                                              \
    INSTANTIATE(name, kernel<Act, half>)                                                                     \
    INSTANTIATE(name "__tbf16", kernel<Act, bfloat>)                                                         \
    INSTANTIATE(name "__tf32", kernel<Act, float>)

#define BOTH(name, Act)                                                                                      \
    ROWS("activation_" name, activation, Act)                                                                \
    ROWS("gated_activation_" name, gated_activation, Act)

BOTH("silu", Silu)
BOTH("gelu", Gelu)
BOTH("gelu_tanh", GeluTanh)
BOTH("quick_gelu", QuickGelu)
BOTH("relu", Relu)
