#pragma once
// What every core may ask about the device. kSimdWidth: threads of a simdgroup; never write 32.
#include "core/apple/constants.h"
#include "core/cpu/constants.h"
#include "core/nvidia/constants.h"
