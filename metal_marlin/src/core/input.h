#pragma once
// What becomes of x before it is multiplied. Pipelines ask an input for one number of a row of x, row(token).at(x, k), or
// for eight of half or bfloat, eight(bits, token, k); kPlain: it leaves them as they are.
#include <metal_stdlib>
using namespace metal;

struct PlainInput {
    enum : bool { kPlain = true };
    struct Row {
        float at(float x, uint) const { return x; }
    };
    Row row(uint) const { return Row{}; }
    uint4 eight(uint4 x, uint, uint) const { return x; }
};
