#pragma once
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "core/nvidia/async_copy.h"
#include "core/nvidia/barrier.h"
#include "core/nvidia/cluster.h"
#include "core/nvidia/packed_codes.h"
#include "core/nvidia/packed_outputs.h"
#include "core/nvidia/wgmma.h"

// A simdgroup that does nothing else keeps a ring of stages filled by the tensor copy unit: x, codes and scales of kDepth
// of k, a copy each (of x several, where tiles can be halved). The others multiply; they wait for a stage to be full and say when they have read it, and meet only
// to add up what those along k have. Schedule::kFew: by the simdgroup's instruction, sums of a scale's weights times that
// scale; else by that of four simdgroups, with weights rounded to T after their scale. As half could not hold every
// scale, a row's are divided by a power of two, which multiplies its sums. Where a simdgroup's sums are outputs,
// threadgroups walk from tile to tile: the ring is filled for the next one while outputs are written.
// (Measured slower: neighbours that each copy half of x to both; threadgroups that share the last tiles along K, as all
// read the same k at a time otherwise.)
template <typename W, typename T, typename Schedule, typename Epilogue> struct RingGemm {
    typedef PackedArguments<W, T> Arguments;
    typedef typename W::Format Format;
    typedef typename W::S S;
    typedef MmaPair<T> Pair;
    typedef Cluster<Schedule::kSplit> Parts;
    typedef TileWalk<Schedule> Tiles;
    typedef ExactProduct<Format, typename W::Scale, T> Exact;
    enum : bool {
        kFew = Schedule::kFew,
        kExact = Exact::value, // weights are multiplied by scales, else sums
        kWhole = !kFew && Schedule::kAlongK == 1 && Schedule::kSplit == 1 // a simdgroup's sums are outputs
    };
    enum : uint {
        kRows = Schedule::kRows,
        kTokens = Schedule::kTokens,
        kDepth = Schedule::kDepth,
        kSplit = Schedule::kSplit,
        kAlongN = Schedule::kAlongN,
        kAlongK = Schedule::kAlongK,
        kSimdgroups = kAlongN * kAlongK * (kFew ? 1 : 4), // that multiply
        kWorkers = kSimdgroups * kSimdWidth,
        kStrips = kFew ? kRows / 16 / kAlongN : 1, // of a simdgroup
        kTiles = kTokens / 8,
        kBlocks = kDepth / 64,
        kTurns = kBlocks / kAlongK, // blocks of a simdgroup
        kSpread = Spread<W>::value,
        kSteps = 4 / kSpread,             // of a block
        kWords = Format::kBits / kSpread, // of a lane and block
        kBlock = 128 * kWords,            // bytes of a strip's codes of a block
        kXBlock = kTokens * 128,          // of x's
        kX = kBlocks * kXBlock,
        kCodes = kRows / 16 * kBlocks * kBlock,
        kPlaces = kSpread == 1 ? 0 : kRows / 16 * kBlocks * 128,
        kScales = kRows * (kDepth / (16 * kSpread)) * sizeof(S), // at most
        kStage = (kX + kCodes + kPlaces + kScales * (W::kAffine ? 2 : 1) + 1023) / 1024 * 1024,
        kOutputs = kWhole ? kSimdgroups * 512 : 16, // bytes: of 16 tokens and a simdgroup's rows
        kRoom = (226 * 1024 - kOutputs) / kStage,
        kStages = kRoom < Schedule::kAhead ? kRoom : Schedule::kAhead,
        kFull = kStages * kStage + kOutputs, // where barriers are
        kEmpty = kFull + kStages * 8,
        kSumStride = kRows + 4
    };
    enum : bool {
        kHandOver = Schedule::kThreads > kWorkers + kSimdWidth // of registers, from simdgroups that copy
    };
    static_assert(kStages >= 2 && kTurns >= 1 && kStrips >= 1, "RingGemm: tile");
    static_assert(kWhole || !Tiles::kHalves, "RingGemm: only tiles that walk can be halved");
    static_assert(!kExact || !W::kAffine, "RingGemm: scaled weights have no offsets");
    static_assert(kSpread == 1 || (Format::kBits == 4 && !W::kAffine), "RingGemm: sparse weights");
    static_assert(kFew || (kTurns % 2 == 0 && kRows == 64 * kAlongN), "RingGemm: tile of four simdgroups");
    static_assert(kWhole || kAlongK * kTokens * kSumStride * 4 <= kStages * kStage,
                  "RingGemm: sums take the place of stages");
    struct alignas(1024) Shared {
        uchar stages[kStages * kStage], outputs[kOutputs];
        ulong full[kStages], empty[kStages];
    };
    struct Place {
        uint rank;         // of the threadgroup along z
        uint first, token; // row of W, token
        uint k, count;     // its first k and stages
        uint lane, simdgroup, along_n, along_k;
        uint stages;      // address
        bool halved;      // a tile of half the tokens
        uint held, shift; // scales of a row that a stage has; weight k has scale k >> shift
        uint full(uint slot) const { return stages + kFull + slot * 8; }
        uint empty(uint slot) const { return stages + kEmpty + slot * 8; }
        void move(Tiles tiles) {
            if (kWhole) first = tiles.row(), token = tiles.token(), halved = tiles.halved();
        }
    };
    struct Turn {
        uint slot, parity;
        void next() {
            if (++slot == kStages) slot = 0, parity ^= 1;
        }
        uint before() const { return (slot == 0 ? uint(kStages) : slot) - 1; }
    };
    // A simdgroup has read a stage.
    static void release(thread const Place& at, uint slot) {
        if (at.lane == 0) PhaseBarrier::arrive(at.empty(slot));
    }

    // ---- simdgroups that copy

    static void ask_weights(thread const Arguments& a, thread const Place& at, ulong maps, uint slot,
                            uint k) {
        const uint to = at.stages + slot * kStage + kX, full = at.full(slot), strip = at.first / 16;
        const uint scales = kRows * at.held * sizeof(S);
        PhaseBarrier::expect(full,
                             (at.halved ? kX / 2 : kX) + kCodes + kPlaces + scales * (W::kAffine ? 2 : 1));
        copy_box3(to, maps + 128, 0, k / 64, strip, full);
        if (kSpread != 1) copy_box3(to + kCodes, maps + 512, 0, k / 64, strip, full);
        copy_box3(to + kCodes + kPlaces, maps + 256, at.first * sizeof(S), k >> a.shift, 0, full);
        if (W::kAffine)
            copy_box3(to + kCodes + kPlaces + kScales, maps + 384, at.first * sizeof(S), k >> a.shift, 0,
                      full);
    }
    static void ask_x(thread const Place& at, ulong maps, uint slot, uint k) {
        const uint to = at.stages + slot * kStage;
        if (!Tiles::kHalves) return copy_box3(to, maps, 0, at.token, k / 64, at.full(slot));
        for (uint b = 0; b < kBlocks; ++b) { // each half's tokens a copy
            copy_box3(to + b * kXBlock, maps, 0, at.token, k / 64 + b, at.full(slot));
            if (!at.halved)
                copy_box3(to + b * kXBlock + kXBlock / 2, maps, 0, at.token + Tiles::kHalf, k / 64 + b,
                          at.full(slot));
        }
    }

    static void produce(thread const Arguments& a, Place at, Tiles tiles) {
        const ulong maps = descriptor_at<7>();
        const bool elected = elect_one();
        at.move(tiles);
        const uint early = kStages < at.count ? kStages : at.count;
        for (uint i = 0; i < early; ++i) {
            if (elected) ask_weights(a, at, maps, i, at.k + i * kDepth);
        }
        LaunchOrder::wait(); // x is of the kernel before; weights are older
        for (uint i = 0; i < early; ++i) {
            if (elected) ask_x(at, maps, i, at.k + i * kDepth);
        }
        Turn turn = {early % kStages,
                     early == kStages ? 0u : 1u}; // the first time, nobody has to have read a stage
        uint first = early;
        do {
            at.move(tiles);
            for (uint i = first; i < at.count; ++i) {
                PhaseBarrier::wait(at.empty(turn.slot), turn.parity);
                if (elected) {
                    ask_weights(a, at, maps, turn.slot, at.k + i * kDepth);
                    ask_x(at, maps, turn.slot, at.k + i * kDepth);
                }
                turn.next();
            }
            first = 0;
            tiles.next();
        } while (kWhole && tiles.more());
    }

    // ---- what the others read

    // Scales of rows r and r + 8 of a strip of the threadgroup's, and zeros or biases: as they are stored, and as numbers.
    struct Stored {
        uint scales, more;
    };
    struct Numbers {
        float2 scale, zero, bias;
    };
    static Stored stored(thread const Place& at, uint stage, uint strip, uint group) {
        const uint from =
            stage + kX + kCodes + kPlaces + (group * kRows + strip * 16 + at.lane / 4 * 2) * sizeof(S);
        Stored v;
        v.scales = sizeof(S) == 1 ? shared_load2(from) : shared_load4(from);
        if (W::kAffine) v.more = sizeof(S) == 1 ? shared_load2(from + kScales) : shared_load4(from + kScales);
        return v;
    }
    static Numbers numbers(Stored of) {
        Numbers v = {0, 0, 0};
        v.scale = ScalePair<typename W::Scale>::values(of.scales);
        if (W::kZero) v.zero = ScalePair<FloatScale<S>>::values(of.more);
        if (W::kBias) v.bias = ScalePair<FloatScale<S>>::values(of.more);
        return v;
    }

    typedef PackedCodes<Format, T, kWords> Codes;
    static uint codes_at(uint stage, uint strip, uint block) {
        return stage + kX + (strip * kBlocks + block) * kBlock;
    }
    static uint places_of(thread const Place& at, uint stage, uint strip, uint block) {
        if (kSpread == 1) return 0;
        return shared_load4(stage + kX + kCodes + (strip * kBlocks + block) * 128 + at.lane * 4);
    }

    static float inverted(float power) {
        return as_type<float>((254u << 23) - as_type<uint>(power));
    } // of two
    static uint join(T a) { return uint(as_type<ushort>(a)) * 0x10001u; }

    // Weight k has scale k >> this: known to the compiler where the format has groups of its own.
    static uint group_shift(thread const Arguments& a) {
        typedef OwnGroup<typename W::Scale> Own;
        return Own::shift != 0 ? uint(Own::shift) : a.shift;
    }

    // ---- few tokens

    typedef RingDecode<Format, T> FewDecode;
    typedef float Sums[kTiles][4];

    // A step's right operands x[c], and its instruction.
    typedef uint Right[4]; // two for every 16 k
    static void load_x(uint from, uint x_at, uint step, thread uint (&pair)[4], thread Right (&x)[kTiles]) {
        if (kTiles == 1) { // `pair` holds two steps of 16 k of eight tokens
            if (kSpread != 1 || step % 2 == 0) shared_matrices(from + (x_at ^ step * kSpread << 5), pair);
#pragma unroll
            for (uint e = 0; e < 2 * kSpread; ++e) x[0][e] = pair[kSpread == 1 ? step % 2 * 2 + e : e];
        } else {
#pragma unroll
            for (uint s = 0; s < kSpread; ++s) {
#pragma unroll
                for (uint c = 0; c + 1 < kTiles; c += 2) {
                    uint v[4];
                    shared_matrices(from + (x_at ^ (step * kSpread + s) << 5) + c * 1024, v);
#pragma unroll
                    for (uint e = 0; e < 2; ++e) x[c][2 * s + e] = v[e], x[c + 1][2 * s + e] = v[2 + e];
                }
            }
        }
    }
    static void mma(thread float (&d)[4], thread const uint (&w)[4], thread const Right& x, uint step,
                    uint places) {
        if (kSpread == 1)
            Pair::mma(d, w[0], w[1], w[2], w[3], x[0], x[1]);
        else if (step == 0)
            SparseMma<T>::template mma<0>(d, w, x, places);
        else
            SparseMma<T>::template mma<1>(d, w, x, places);
    }

    template <uint kRuns>
    static void few_block(thread const Place& at, uint stage, uint x_at, uint turn,
                          thread Sums (&total)[kStrips]) {
        enum : uint { kRun = kSteps / kRuns }; // steps
        const uint block = turn * kAlongK + at.along_k, x_from = stage + turn * (kAlongK * kXBlock);
        Codes codes[kStrips];
        uint places[kStrips];
        Stored scales[kStrips][kRuns];
#pragma unroll
        for (uint r = 0; r < kStrips; ++r) {
            const uint strip = at.along_n * kStrips + r;
            codes[r] = Codes::load(codes_at(stage, strip, block), at.lane);
            places[r] = places_of(at, stage, strip, block);
#pragma unroll
            for (uint run = 0; run < kRuns; ++run)
                scales[r][run] = stored(at, stage, strip, (block * 64 + run * (64 / kRuns)) >> at.shift);
        }
        uint pair[4];
#pragma unroll
        for (uint run = 0; run < kRuns; ++run) {
            Sums part[kStrips], ones;
#pragma unroll
            for (uint c = 0; c < kTiles; ++c) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) {
                    ones[c][e] = 0;
#pragma unroll
                    for (uint r = 0; r < kStrips; ++r) part[r][c][e] = 0;
                }
            }
#pragma unroll
            for (uint i = 0; i < kRun; ++i) {
                const uint step = run * kRun + i;
                Right x[kTiles];
                load_x(x_from, x_at, step, pair, x);
#pragma unroll
                for (uint r = 0; r < kStrips; ++r) {
                    uint w[4];
                    Codes::template operand<FewDecode>(codes[r], step, w);
                    if (kExact) {
#pragma unroll
                        for (uint j = 0; j < 4; ++j) w[j] = Exact::times(w[j], scales[r][run].scales, j % 2);
                    }
#pragma unroll
                    for (uint c = 0; c < kTiles; ++c)
                        mma(kExact ? total[r][c] : part[r][c], w, x[c], step, places[r]);
                }
                if (W::kAffine) {
                    const uint one = join(T(1));
#pragma unroll
                    for (uint c = 0; c < kTiles; ++c)
                        Pair::mma(ones[c], one, one, one, one, x[c][0], x[c][1]);
                }
            }
#pragma unroll
            for (uint r = 0; r < kStrips && !kExact; ++r) {
                const Numbers v = numbers(scales[r][run]);
#pragma unroll
                for (uint h = 0; h < 2; ++h) {
                    const float offset =
                        W::kAffine ? v.bias[h] + v.scale[h] * (Middle<W>::value - v.zero[h]) : 0.0f;
#pragma unroll
                    for (uint c = 0; c < kTiles; ++c) {
#pragma unroll
                        for (uint e = 2 * h; e < 2 * h + 2; ++e) {
                            total[r][c][e] += v.scale[h] * part[r][c][e];
                            if (W::kAffine) total[r][c][e] += offset * ones[c][e];
                        }
                    }
                }
            }
        }
    }

    template <uint kRuns>
    static void few(thread const Place& at, thread Turn& turn, thread Sums (&total)[kStrips]) {
        // rows of 128 bytes, whose 16-byte chunk c lies at c ^ row % 8; a matrix is 8 tokens of 8 k
        const uint matrix = at.lane / 8, row = at.lane % 8;
        const uint token = kTiles == 1 ? row : matrix / 2 * 8 + row,
                   chunk = kTiles == 1 ? matrix : matrix % 2;
        const uint x_at = token * 128 + ((chunk ^ row) << 4) + at.along_k * kXBlock;
        for (uint i = 0; i < at.count; ++i) {
            PhaseBarrier::wait(at.full(turn.slot), turn.parity);
            const uint stage = at.stages + turn.slot * kStage;
#pragma unroll
            for (uint t = 0; t < kTurns; ++t) few_block<kRuns>(at, stage, x_at, t, total);
            simdgroup_barrier(mem_flags::mem_threadgroup);
            release(at, turn.slot);
            turn.next();
        }
    }

    // ---- many tokens

    typedef RingCodes<Format, T> ManyDecode;

    template <uint kRuns>
    static void decode(thread const Place& at, uint stage, uint block, thread const float (&inverse)[2],
                       thread uint (&left)[kSteps][4]) {
        const Codes codes = Codes::load(codes_at(stage, at.along_n, block), at.lane);
        uint scales[2], shifts[2], offsets[2];
#pragma unroll
        for (uint step = 0; step < kSteps; ++step) {
            if (step * kRuns % kSteps == 0) {
                const uint group = (block * 64 + step * (64 / kSteps)) >> at.shift;
                const Numbers v = numbers(stored(at, stage, at.along_n, group));
#pragma unroll
                for (uint h = 0; h < 2; ++h) {
                    scales[h] = join(T(v.scale[h] * (inverse[h] * ManyDecode::kUnit)));
                    if (W::kZero) shifts[h] = join(T(-v.zero[h]));
                    if (W::kBias) offsets[h] = join(T(v.bias[h] * inverse[h]));
                }
            }
            uint w[4];
            Codes::template operand<ManyDecode>(codes, step, w);
#pragma unroll
            for (uint i = 0; i < 4; ++i) {
                const uint h = i % 2;
                if (W::kZero) w[i] = Pair::plus(w[i], shifts[h]);
                left[step][i] =
                    W::kBias ? Pair::fma(w[i], scales[h], offsets[h]) : Pair::times(w[i], scales[h]);
            }
        }
    }

    template <uint kCount>
    static void mma(thread float (&d)[kCount], thread const uint (&w)[4], uint x, uint step, uint places) {
        typedef Wgmma<T, kCount * 2> Instruction;
        if (kSpread == 1)
            Instruction::mma(d, w, x + 2 * step);
        else if (step == 0)
            Instruction::template sparse<0>(d, w, places, x);
        else
            Instruction::template sparse<1>(d, w, places, x + 4);
    }

    template <uint kRuns, uint kCount>
    static void many(thread const Place& at, thread const float (&inverse)[2], thread Turn& turn,
                     thread float (&d)[kCount]) {
        uint left[2][kSteps][4], places[2];
        for (uint i = 0; i < at.count; ++i) {
            PhaseBarrier::wait(at.full(turn.slot), turn.parity);
            const uint stage = at.stages + turn.slot * kStage;
#pragma unroll
            for (uint t = 0; t < kTurns; ++t) {
                const uint block = t * kAlongK + at.along_k;
                // the instructions of the block before may still be running: they read the other left operands
                decode<kRuns>(at, stage, block, inverse, left[t % 2]);
                places[t % 2] = places_of(at, stage, at.along_n, block);
                WgmmaGroup::fence();
#pragma unroll
                for (uint step = 0; step < kSteps; ++step)
                    mma(d, left[t % 2][step], WgmmaGroup::describe(stage + block * kXBlock), step,
                        places[t % 2]);
                WgmmaGroup::commit();
                WgmmaGroup::wait<1>();
                if (t == 0 && i > 0) release(at, turn.before());
            }
            turn.next();
        }
        WgmmaGroup::wait<0>();
        Wgmma<T, kCount * 2>::hold(d);
        release(at, turn.before());
    }

    // ---- both

    typedef RingOutputs<RingGemm, T, Epilogue> Outputs;

    // Which matrix instruction: a function that is not chosen is not compiled.
    struct FewTokens {};
    template <uint kCount> struct ManyTokens {}; // so many sums a thread

    static void finish(FewTokens, thread const Arguments& a, thread const Place& at, Tiles, thread Turn& turn,
                       Epilogue epilogue) {
        Sums total[kStrips];
#pragma unroll
        for (uint r = 0; r < kStrips; ++r) {
#pragma unroll
            for (uint c = 0; c < kTiles; ++c) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) total[r][c][e] = 0;
            }
        }
        const uint shift = group_shift(a);
        if (shift >= 6)
            few<1>(at, turn, total);
        else if (shift == 5)
            few<2>(at, turn, total);
        else
            few<kSteps>(at, turn, total);
        Outputs::meet(); // all stages have been read
        const float unit = FewDecode::kUnit * a.factor();
#pragma unroll
        for (uint r = 0; r < kStrips; ++r) {
#pragma unroll
            for (uint c = 0; c < kTiles; ++c) {
                float d[4];
#pragma unroll
                for (uint e = 0; e < 4; ++e) d[e] = total[r][c][e] * unit;
                Outputs::put(at, at.along_n * kStrips + r, c, d);
            }
        }
        Outputs::add(a, at, epilogue);
    }

    template <uint kCount>
    static void finish(ManyTokens<kCount>, thread const Arguments& a, Place at, Tiles tiles,
                       thread Turn& turn, Epilogue epilogue) {
        float d[kCount], inverse[2];
#pragma unroll
        for (uint i = 0; i < kCount; ++i) d[i] = 0;
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            inverse[h] = inverted(a.powers[min(at.first + at.along_n * 16 + at.lane / 4 + h * 8, a.N - 1)]);
        }
        const uint shift = group_shift(a);
        if (shift >= 6)
            many<1>(at, inverse, turn, d);
        else if (shift == 5)
            many<2>(at, inverse, turn, d);
        else
            many<kSteps>(at, inverse, turn, d);
        // Read again, and `at` as if it had changed: what outputs need takes no registers until here.
        uint tid;
        __asm__ volatile("mov.u32 %0, %%tid.x;" : "=r"(tid), "+r"(tiles.at));
        at.lane = tid % kSimdWidth, at.simdgroup = tid / kSimdWidth,
        at.along_n = at.simdgroup % (kAlongN * 4);
        at.move(tiles);
        const float power[2] = {inverted(inverse[0]) * a.factor(), inverted(inverse[1]) * a.factor()};
        if (kWhole) return Outputs::write(a, at, epilogue, power, d);
        Outputs::meet(); // all stages have been read
#pragma unroll
        for (uint c = 0; c < kCount / 4; ++c) {
            float v[4];
#pragma unroll
            for (uint e = 0; e < 4; ++e) v[e] = d[4 * c + e] * power[e / 2];
            Outputs::put(at, at.along_n, c, v);
        }
        Outputs::add(a, at, epilogue);
    }

    static Place place(thread const Arguments& a, GemmPlace where, threadgroup const Shared& sh) {
        const uint across = kAlongN * (kFew ? 1 : 4), stages = (a.K + kDepth - 1) / kDepth;
        Place at;
        at.first = where.tgid.x * kRows; // until it moves
        at.token = where.tgid.y * kTokens;
        at.halved = false;
        at.rank = kSplit > 1 ? where.tgid.z : 0;
        const uint begin = stages * at.rank / kSplit;
        at.k = begin * kDepth;
        at.count = stages * (at.rank + 1) / kSplit - begin;
        at.lane = where.lane;
        at.simdgroup = where.sgid;
        at.along_n = where.sgid % across;
        at.along_k = where.sgid / across;
        at.stages = AsyncCopy::address(sh.stages);
        at.held = a.group >= kDepth ? 1 : kDepth / a.group;
        at.shift = a.shift;
        return at;
    }

    static void run(Arguments a, Tiles tiles, GemmPlace where, threadgroup Shared& sh, Epilogue epilogue) {
        LaunchOrder::let_next_start();
        Residency<sizeof(Shared)>::ask();
        if (kSplit > 1) Parts::form();
        Place at = place(a, where, sh);
        if (at.simdgroup == 0 && at.lane < kStages) {
            PhaseBarrier::start(at.full(at.lane), 1);
            PhaseBarrier::start(at.empty(at.lane), kSimdgroups);
            PhaseBarrier::publish();
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (at.simdgroup >= kSimdgroups) {
            if (kHandOver) Registers::give<24>(); // of 168: four simdgroups give what eight take
            if (at.simdgroup == kSimdgroups) produce(a, at, tiles);
            return;
        }
        if (kHandOver) Registers::take<240>();
        Turn turn = {0, 0};
        do {
            at.move(tiles);
            if (at.halved) break;
            finish(conditional_t<kFew, FewTokens, ManyTokens<kTokens / 2>>(), a, at, tiles, turn, epilogue);
            tiles.next();
        } while (kWhole && tiles.more());
        for (; Tiles::kHalves && tiles.more(); tiles.next()) {
            at.move(tiles);
            finish(conditional_t<kFew, FewTokens, ManyTokens<Tiles::kHalf / 2>>(), a, at, tiles, turn,
                   epilogue);
        }
    }
};
template <typename W, typename T, typename Schedule, typename Epilogue>
using PackedGemm = RingGemm<W, T, Schedule, Epilogue>;
#else
template <typename W, typename T, typename Schedule, typename Epilogue>
using PackedGemm = SimdPacked<W, T, Schedule, Epilogue>;
#endif
