// Self-attention in float32 for heads of one width, WIDTH, set at compile time; no masks, dropout or gradients.
//
// Query, key, value and context are (batch, tokens, heads, WIDTH). Returns whether all contexts are valid.
//
// Logits never reach memory: as many queries as fit one vector register meet a few keys at a time, whose exponentials
// weigh the values at once (as FlashAttention, Dao et al., NeurIPS 2022). Unlike there, no maximum is subtracted:
// exponentials are summed as they are, and a sum near the ends of float32 tells that they were too large or too small
// for that. The order of sums depends on nothing but the number of tokens: any number of threads gives the same bits.

#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats in a register
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int KEYS = 8;             // met at a time: enough to keep the multipliers busy, few enough for the registers
constexpr int ROW = 2 * WIDTH + 1;  // a key, its value, and a 1 that adds up the weights
constexpr float LARGEST_SUM = 0x1p60f;
constexpr float LOG2_E = 1.44269504f;
constexpr float ROUNDING = 0x1.8p23f;  // adding it leaves the nearest whole number in the lowest bits

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int ints __attribute__((vector_size(4 * LANES)));

// 2^x within 2e-7 of itself, for x cut to [-126, 127]: the whole part goes into the exponent's bits, the rest, within
// half of 0, into Taylor's series, whose coefficients are ln(2)^k / k!.
static inline floats power_of_two(floats x) {
    x = x < -126.0f ? floats{} - 126.0f : x;
    x = x > 127.0f ? floats{} + 127.0f : x;
    const floats rounded = x + ROUNDING, rest = x - (rounded - ROUNDING);
    floats power = 1.54035304e-4f * rest + 1.33335581e-3f;
    power = power * rest + 9.61812911e-3f;
    power = power * rest + 5.55041087e-2f;
    power = power * rest + 2.40226507e-1f;
    power = power * rest + 6.93147181e-1f;
    power = power * rest + 1.0f;
    return (floats)((ints)power + ((ints)rounded << 23));
}

// The contexts of up to LANES queries with all keys of their head; `rows` is a multiple of KEYS, and tokens lie
// `stride` floats apart.
static bool attend(const float *query, int queries, const float *row, long rows, float scale, float *context,
                   long stride) {
    floats asked[WIDTH], found[WIDTH + 1] = {};
    for (int e = 0; e < WIDTH; e++)
        for (int lane = 0; lane < LANES; lane++) asked[e][lane] = lane < queries ? scale * query[lane * stride + e] : 0;
    for (long first = 0; first < rows; first += KEYS, row += KEYS * ROW) {
        floats weight[KEYS] = {};
        for (int e = 0; e < WIDTH; e++)
            for (int k = 0; k < KEYS; k++) weight[k] += asked[e] * row[k * ROW + e];
        for (int k = 0; k < KEYS; k++) weight[k] = power_of_two(weight[k]);
        for (int e = 0; e <= WIDTH; e++)
            for (int k = 0; k < KEYS; k++) found[e] += weight[k] * row[k * ROW + WIDTH + e];
    }
    bool good = true;
    for (int lane = 0; lane < queries; lane++) {
        const float sum = found[WIDTH][lane];
        good = good && sum > 1 / LARGEST_SUM && sum < LARGEST_SUM;  // and false for what is no number
        for (int e = 0; e < WIDTH; e++) context[lane * stride + e] = found[e][lane] / sum;
    }
    return good;
}

extern "C" bool attend_all(const float *query, const float *key, const float *value, long batch, long heads,
                           long tokens, float scaling, int threads, float *context) {
    const long rows = (tokens + KEYS - 1) / KEYS * KEYS;  // those beyond the tokens are 0, and so add nothing
    const long stride = heads * WIDTH;
    bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
    {
        std::vector<float> laid_out(rows * ROW);
#pragma omp for collapse(2)
        for (long item = 0; item < batch; item++)
            for (long head = 0; head < heads; head++) {
                const long start = item * tokens * stride + head * WIDTH;
                for (long token = 0; token < tokens; token++) {
                    const long from = start + token * stride;
                    float *row = &laid_out[token * ROW];
                    for (int e = 0; e < WIDTH; e++) row[e] = key[from + e], row[WIDTH + e] = value[from + e];
                    row[2 * WIDTH] = 1;
                }
                for (long token = 0; token < tokens; token += LANES) {
                    const int queries = tokens - token < LANES ? tokens - token : LANES;
                    const long from = start + token * stride;
                    const bool these = attend(query + from, queries, laid_out.data(), rows, scaling * LOG2_E,
                                              context + from, stride);
                    good = good && these;
                }
            }
    }
    return good;
}
