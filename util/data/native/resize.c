/* Antialiased bicubic resizing, as PIL's: the Keys filter with a = -0.5, stretched by the scale. It is applied along
 * the rows and then along the columns, and the result is rounded to 8 bits each time. All arithmetic is on integers, so
 * that every processor gives the same bits. */
#include "native.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

#define GROUP 4 /* rows that are resized together */

struct filter {
    int taps, shift; /* taps is a multiple of 4; weights are integers in units of 2^-shift */
    int *start;      /* (out,), first source position */
    int16_t *weight; /* (out, taps) */
};

struct resizer {
    struct filter x, y;
    int out_width, out_height, rows, stride, input_stride, flags;
    uint8_t *input;  /* GROUP rows of the source; after each, room that a filter reads with weight 0 */
    uint8_t *middle; /* (rows, stride) RGBX of out_width columns */
};

static double cubic(double x) {
    x = fabs(x);
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0)
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
    return 0.0;
}

/* Make the weights of `out` positions over the `in` source positions from `offset` to `offset + extent`. The source
 * ends at the crop's edges, as if the crop were cut out before it is resized. */
static int make_filter(struct filter *filter, double offset, double extent, int in, int out, int flip) {
    double scale = extent / out, stretch = scale > 1.0 ? scale : 1.0, support = 2.0 * stretch;
    int first = (int)offset, end = (int)ceil(offset + extent), most = (int)ceil(support) * 2 + 1;
    end = end < in ? end : in;
    filter->start = malloc(out * sizeof *filter->start);
    filter->weight = calloc((size_t)out * (most + 3), sizeof *filter->weight);
    double *exact = malloc((size_t)out * most * sizeof *exact), largest = 0.0;
    if (!filter->start || !filter->weight || !exact) {
        free(exact);
        return NO_MEMORY;
    }
    for (int i = 0; i < out; i++) {
        double centre = offset + (i + 0.5) * scale, sum = 0.0, *w = exact + (size_t)i * most;
        int from = (int)floor(centre - support + 0.5), to = (int)floor(centre + support + 0.5);
        from = from > first ? from : first;
        to = to < end ? to : end;
        filter->taps = to - from > filter->taps ? to - from : filter->taps;
        for (int k = 0; k < most; k++)
            sum += w[k] = k < to - from ? cubic((from + k - centre + 0.5) / stretch) : 0.0;
        for (int k = 0; k < most; k++) {
            w[k] /= sum;
            largest = w[k] > largest ? w[k] : largest;
        }
        filter->start[flip ? out - 1 - i : i] = from;
    }
    filter->taps = (filter->taps + 3) & ~3;
    /* As many bits as fit in 16, rounded half away from zero: the integers of torchvision's kernel. */
    filter->shift = 0;
    while (filter->shift < 22 && (int)(0.5 + largest * (1 << (filter->shift + 1))) < 1 << 15)
        filter->shift++;
    for (int i = 0; i < out; i++) {
        const double *w = exact + (size_t)i * most;
        int16_t *to = filter->weight + (size_t)(flip ? out - 1 - i : i) * filter->taps;
        for (int k = 0; k < filter->taps && k < most; k++)
            to[k] = (int16_t)(w[k] * (1 << filter->shift) + (w[k] < 0.0 ? -0.5 : 0.5));
    }
    free(exact);
    return DONE;
}

struct resizer *resizer_new(struct box box, int in_width, int in_height, int out_width, int out_height, int flags) {
    struct resizer *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->out_width = out_width, r->out_height = out_height, r->flags = flags, r->rows = in_height;
    r->stride = (out_width * 4 + 31) & ~31;
#ifdef HAVE_AVX2
    if (!__builtin_cpu_supports("avx2"))
        r->flags |= PORTABLE;
#endif
    r->middle = malloc((size_t)(r->rows + GROUP - 1) * r->stride);
    int x_status = make_filter(&r->x, box.left, box.width, in_width, out_width, flags & FLIP_X);
    int y_status = make_filter(&r->y, box.top, box.height, in_height, out_height, flags & FLIP_Y);
    r->input_stride = (in_width + r->x.taps) * 4;
    r->input = calloc(GROUP, r->input_stride);
    if (!r->middle || !r->input || x_status != DONE || y_status != DONE) {
        resizer_free(r);
        return NULL;
    }
    return r;
}

void resizer_free(struct resizer *r) {
    if (!r)
        return;
    free(r->x.start), free(r->x.weight), free(r->y.start), free(r->y.weight), free(r->input), free(r->middle);
    free(r);
}

static uint8_t rounded(int sum, int shift) {
    sum = (sum + (1 << (shift - 1))) >> shift;
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

static void rows_portable(const struct resizer *r, uint8_t *out) {
    for (int y = 0; y < GROUP; y++)
        for (int i = 0; i < r->out_width; i++) {
            const int16_t *w = r->x.weight + (size_t)i * r->x.taps;
            const uint8_t *from = r->input + (size_t)y * r->input_stride + 4 * r->x.start[i];
            int sum[4] = { 0 };
            for (int k = 0; k < r->x.taps; k++)
                for (int c = 0; c < 4; c++)
                    sum[c] += w[k] * from[4 * k + c];
            for (int c = 0; c < 4; c++)
                out[(size_t)y * r->stride + 4 * i + c] = rounded(sum[c], r->x.shift);
        }
}

static void columns_portable(const struct resizer *r, int y, uint8_t *out, size_t plane) {
    const int16_t *w = r->y.weight + (size_t)y * r->y.taps;
    const uint8_t *from = r->middle + (size_t)r->y.start[y] * r->stride;
    for (int i = 0; i < r->out_width; i++)
        for (int c = 0; c < 3; c++) {
            int sum = 0;
            for (int k = 0; k < r->y.taps; k++)
                if (w[k]) /* with weight 0 the row need not exist */
                    sum += w[k] * from[(size_t)k * r->stride + 4 * i + c];
            out[c * plane + i] = rounded(sum, r->y.shift);
        }
}

#ifdef HAVE_AVX2
/* Two rows per vector, four pixels of each at a time. The bytes of pixels 0 and 1 are spread to 16-bit pairs (r0 r1)
 * (g0 g1) (b0 b1) (x0 x1), then those of pixels 2 and 3, and multiplied by the pairs of weights. */
__attribute__((target("avx2"))) static void rows_avx2(const struct resizer *r, uint8_t *out) {
    const __m256i pixels01 = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,
                                              0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
    const __m256i pixels23 = _mm256_or_si256(pixels01, _mm256_set1_epi16(8));
    const __m256i half = _mm256_set1_epi32(1 << (r->x.shift - 1));
    const __m128i shift = _mm_cvtsi32_si128(r->x.shift);
    const int16_t *w = r->x.weight;
    for (int i = 0; i < r->out_width; i++, out += 4) {
        const uint8_t *from = r->input + 4 * r->x.start[i];
        __m256i sum[2] = { half, half };
        for (int k = 0; k < r->x.taps; k += 4, w += 4, from += 16) {
            int pair[2];
            memcpy(pair, w, 8);
            __m256i weights01 = _mm256_set1_epi32(pair[0]), weights23 = _mm256_set1_epi32(pair[1]);
            for (int y = 0; y < 2; y++) {
                const uint8_t *row = from + (size_t)2 * y * r->input_stride;
                __m256i pixels = _mm256_inserti128_si256(
                    _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)row)),
                    _mm_loadu_si128((const __m128i *)(row + r->input_stride)), 1);
                sum[y] = _mm256_add_epi32(sum[y], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, pixels01), weights01));
                sum[y] = _mm256_add_epi32(sum[y], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, pixels23), weights23));
            }
        }
        __m256i all = _mm256_packs_epi32(_mm256_sra_epi32(sum[0], shift), _mm256_sra_epi32(sum[1], shift));
        all = _mm256_packus_epi16(all, all); /* rows 0 and 2 in the lower half, 1 and 3 in the upper */
        __m128i even = _mm256_castsi256_si128(all), odd = _mm256_extracti128_si256(all, 1);
        int four[4] = { _mm_cvtsi128_si32(even), _mm_cvtsi128_si32(odd), _mm_extract_epi32(even, 1), _mm_extract_epi32(odd, 1) };
        for (int y = 0; y < GROUP; y++)
            memcpy(out + (size_t)y * r->stride, &four[y], 4);
    }
}

/* Eight pixels of two rows at a time. The bytes of both rows are interleaved, widened and multiplied by the weights. */
__attribute__((target("avx2"))) static void columns_avx2(const struct resizer *r, int y, uint8_t *out, size_t plane) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (r->y.shift - 1));
    const __m256i by_colour = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                               0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i join = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m128i shift = _mm_cvtsi32_si128(r->y.shift);
    const int16_t *w = r->y.weight + (size_t)y * r->y.taps;
    int start = r->y.start[y], taps = r->rows - start < r->y.taps ? r->rows - start : r->y.taps;
    for (int x = 0; x < r->out_width; x += 8) {
        const uint8_t *from = r->middle + (size_t)start * r->stride + 4 * x;
        __m256i sum[4] = { half, half, half, half };
        for (int k = 0; k < taps; k += 2) {
            __m256i a = _mm256_loadu_si256((const __m256i *)(from + (size_t)k * r->stride));
            __m256i b = k + 1 < taps ? _mm256_loadu_si256((const __m256i *)(from + (size_t)(k + 1) * r->stride)) : zero;
            __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            int pair;
            memcpy(&pair, w + k, 4);
            __m256i weights = _mm256_set1_epi32(pair);
            sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weights));
            sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weights));
            sum[2] = _mm256_add_epi32(sum[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weights));
            sum[3] = _mm256_add_epi32(sum[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weights));
        }
        for (int i = 0; i < 4; i++)
            sum[i] = _mm256_sra_epi32(sum[i], shift);
        __m256i pixels = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
        uint8_t colours[32]; /* r0..r7 g0..g7 b0..b7 x0..x7 */
        _mm256_storeu_si256((__m256i *)colours,
                            _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(pixels, by_colour), join));
        if (x + 8 <= r->out_width)
            for (int c = 0; c < 3; c++)
                memcpy(out + c * plane + x, colours + 8 * c, 8);
        else
            for (int c = 0; c < 3; c++)
                memcpy(out + c * plane + x, colours + 8 * c, r->out_width - x);
    }
}
#endif

uint8_t *resizer_input(struct resizer *r, int y) { return r->input + (size_t)(y % GROUP) * r->input_stride; }

void resizer_row(struct resizer *r, int y) {
    if (y % GROUP != GROUP - 1 && y != r->rows - 1)
        return;
    uint8_t *out = r->middle + (size_t)(y - y % GROUP) * r->stride; /* has room for a whole last group */
#ifdef HAVE_AVX2
    if (!(r->flags & PORTABLE)) {
        rows_avx2(r, out);
        return;
    }
#endif
    rows_portable(r, out);
}

void resizer_finish(const struct resizer *r, uint8_t *planes) {
    size_t plane = (size_t)r->out_width * r->out_height;
    for (int y = 0; y < r->out_height; y++) {
        uint8_t *out = planes + (size_t)y * r->out_width;
#ifdef HAVE_AVX2
        if (!(r->flags & PORTABLE)) {
            columns_avx2(r, y, out, plane);
            continue;
        }
#endif
        columns_portable(r, y, out, plane);
    }
}
