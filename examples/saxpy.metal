// y = a x + y, one thread an element. The grid has exactly as many threads as there are elements, so no
// bounds check is needed: an incomplete last threadgroup is simply smaller.
#include <metal_stdlib>
using namespace metal;

kernel void saxpy(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  constant float& a [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    y[i] = fma(a, x[i], y[i]);
}
