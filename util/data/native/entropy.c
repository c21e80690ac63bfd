/* Huffman decoding of baseline JPEGs. It replaces libjpeg's, which takes two thirds of the decoding time.
 *
 * The whole scan lies in memory. So the stuffed zero bytes are removed once, and bits are read without a search for
 * markers, in a loop with few branches that the processor can mispredict. With restart markers, segments outside
 * of the crop are skipped. Anything irregular goes to `fail`: the general decoder then decides about the file. */
#include "native.h"
#include <stdlib.h>
#include <string.h>

#define LOOK 10      /* bits of a table lookup; nearly all codes are shorter */
#define END_RUN 64   /* end of block, as a run that leaves the block */
#define BAD_RUN 127
#define PADDING 512  /* readable bytes after the data; a block takes 64 * 31 bits at most */

/* libjpeg calls decode_mcu for each MCU. This structure is from its internal header and has not changed since
 * version 6b; `native_ready` tries it out. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr codec);
    boolean (*decode_mcu)(j_decompress_ptr codec, JBLOCKROW *blocks);
    boolean insufficient_data;
};

struct table {
    struct code {
        /* bits of code and value together (0: a longer code), of the code, of the value; run of zeros */
        uint8_t bits, length, size, run;
    } look[1 << LOOK];
    int32_t last[17], offset[17]; /* by length: the largest code, or -1; the index of the first symbol minus its code */
    const UINT8 *symbols;
    int is_dc;
};

struct entropy {
    struct table dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
    int columns, restart, first, last; /* MCUs per row, per segment; first and last column that the crop needs */
    int whole_segments;                /* a row is a whole number of segments, so segments can be skipped */
    int column, left, segment, segments;
    int dc_value[MAX_COMPS_IN_SCAN];
    uint64_t bits; /* the next bits, from the most significant one */
    int count;     /* number of valid bits */
    const uint8_t *at;
    uint8_t *bytes;
    size_t *start; /* (segments + 1,) offsets in bytes */
};

static const uint8_t ZIGZAG[64] = {
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55,
    62, 63
};

static void fail(j_decompress_ptr codec) { codec->err->error_exit((j_common_ptr)codec); }

/* Copy the scan without stuffed zeros and markers, and note where each segment starts. UNUSUAL if the scan is not as
 * declared. */
static int unstuff(struct entropy *e, const uint8_t *at, const uint8_t *end) {
    uint8_t *to = e->bytes;
    int found = 0;
    e->start[0] = 0;
    for (;;) {
        const uint8_t *ff = memchr(at, 0xFF, end - 1 - at);
        if (!ff)
            return UNUSUAL;
        memcpy(to, at, ff - at);
        to += ff - at;
        at = ff + 2;
        if (ff[1] == 0) {
            *to++ = 0xFF;
            continue;
        }
        e->start[++found] = to - e->bytes;
        if (found == e->segments)
            break; /* any marker ends the last segment */
        if (ff[1] != 0xD0 + (found - 1) % 8)
            return UNUSUAL;
    }
    memset(to, 0, PADDING);
    return DONE;
}

static struct code make_code(int symbol, int length, int is_dc) {
    int size = symbol & 15, run = is_dc ? 0 : symbol >> 4;
    if (!is_dc && size == 0 && run != 15)
        run = END_RUN;
    if (!is_dc && size > 10)
        run = BAD_RUN; /* impossible in 8-bit images; so two codes and their values fit in 56 bits */
    return (struct code){ (uint8_t)(length + size), (uint8_t)length, (uint8_t)size, (uint8_t)run };
}

/* libjpeg checked the table when it started the scan: the codes fit in their lengths. */
static void make_table(struct table *table, const JHUFF_TBL *from, int is_dc) {
    memset(table->look, 0, sizeof table->look);
    table->symbols = from->huffval;
    table->is_dc = is_dc;
    int code = 0, index = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->offset[length] = index - code;
        for (int i = 0; i < from->bits[length]; i++, code++, index++) {
            struct code made = make_code(from->huffval[index], length, is_dc);
            for (int w = 0; length <= LOOK && w < 1 << (LOOK - length); w++)
                table->look[(code << (LOOK - length)) + w] = made;
        }
        table->last[length] = from->bits[length] ? code - 1 : -1;
    }
}

static struct code long_code(j_decompress_ptr codec, const struct table *table, uint64_t bits) {
    for (int length = LOOK + 1; length <= 16; length++) {
        int code = (int)(bits >> (64 - length));
        if (code <= table->last[length])
            return make_code(table->symbols[(code + table->offset[length]) & 255], length, table->is_dc);
    }
    fail(codec);
    return (struct code){ 0 };
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define FROM_BIG_ENDIAN(x) (x)
#else
#define FROM_BIG_ENDIAN(x) __builtin_bswap64(x)
#endif

/* Make at least 56 bits valid: two codes with their values. Bits beyond the valid ones are correct already, or 0. */
#define REFILL                                \
    memcpy(&next, at, 8);                     \
    bits |= FROM_BIG_ENDIAN(next) >> count;   \
    at += (63 - count) >> 3;                  \
    count |= 56;

/* Set `code` and `value`. The value has `size` bits, and a leading 0 means a negative number. */
#define NEXT(table)                                                                                      \
    code = (table)->look[bits >> (64 - LOOK)];                                                           \
    if (code.bits == 0)                                                                                  \
        code = long_code(codec, table, bits);                                                            \
    rest = bits << code.length;                                                                          \
    value = (int)(rest >> 1 >> (63 - code.size)) - (((1 << code.size) - 1) & ~(int)((int64_t)rest >> 63)); \
    bits <<= code.bits;                                                                                  \
    count -= code.bits;

/* Store a coefficient, or end the block when k leaves it. */
#define STORE                                 \
    k += code.run;                            \
    if (k > 63) {                             \
        regular = code.run == END_RUN;        \
        break;                                \
    }                                         \
    if (block)                                \
        block[ZIGZAG[k]] = (JCOEF)value;      \
    k++;

/* Decode one block into `block`; skip it if that is NULL. */
static inline __attribute__((always_inline)) void decode_block(j_decompress_ptr codec, struct entropy *e,
                                                               const struct table *dc, const struct table *ac,
                                                               int *dc_value, JCOEF *block) {
    uint64_t bits = e->bits, next, rest;
    const uint8_t *at = e->at;
    int count = e->count, value, k = 1, regular = 1;
    struct code code;
    REFILL
    NEXT(dc)
    *dc_value = (int)((unsigned)*dc_value + (unsigned)value);
    if (block)
        block[0] = (JCOEF)*dc_value;
    while (k < 64) {
        REFILL
        NEXT(ac)
        STORE
        if (k == 64)
            break;
        NEXT(ac)
        STORE
    }
    if (!regular)
        fail(codec);
    e->bits = bits;
    e->count = count;
    e->at = at;
    if ((size_t)(at - e->bytes) * 8 - count > e->start[e->segment + 1] * 8)
        fail(codec); /* the segment is too short */
}

static void next_segment(struct entropy *e) {
    e->at = e->bytes + e->start[++e->segment];
    e->bits = 0;
    e->count = 0;
    e->left = e->restart;
    memset(e->dc_value, 0, sizeof e->dc_value);
}

static boolean decode_mcu(j_decompress_ptr codec, JBLOCKROW *blocks) {
    struct entropy *e = codec->client_data;
    if (e->left == 0) {
        if (e->segment + 1 >= e->segments)
            fail(codec);
        next_segment(e);
    }
    int column = e->column, position = e->restart - e->left;
    e->left--;
    e->column = column + 1 == e->columns ? 0 : column + 1;
    int wanted = blocks && column >= e->first && column <= e->last;
    /* Later MCUs of a segment depend on the earlier ones. A segment is skipped if the crop needs none of it. */
    if (e->whole_segments && !wanted && (!blocks || column > e->last || column - position + e->restart <= e->first))
        return TRUE;
    for (int b = 0; b < codec->blocks_in_MCU; b++) {
        int c = codec->MCU_membership[b];
        const jpeg_component_info *component = codec->cur_comp_info[c];
        const struct table *dc = &e->dc[component->dc_tbl_no], *ac = &e->ac[component->ac_tbl_no];
        if (wanted)
            decode_block(codec, e, dc, ac, &e->dc_value[c], *blocks[b]);
        else
            decode_block(codec, e, dc, ac, &e->dc_value[c], NULL);
    }
    return TRUE;
}

/* Replace libjpeg's decoder by this one, after jpeg_start_decompress. first, last: columns of MCUs that are needed.
 * The caller releases *entropy by entropy_free, also after a failure. */
int entropy_attach(struct entropy **entropy, j_decompress_ptr codec, const uint8_t *data, size_t size,
                   const struct header *header, int first, int last) {
    struct entropy *e = *entropy = calloc(1, sizeof *e);
    if (!e)
        return NO_MEMORY;
    int columns = (header->width + header->mcu_width - 1) / header->mcu_width;
    int rows = (header->height + header->mcu_height - 1) / header->mcu_height;
    if ((int)codec->MCUs_per_row != columns)
        return UNUSUAL;
    e->columns = columns;
    e->restart = header->restart ? header->restart : columns * rows;
    e->segments = (columns * rows + e->restart - 1) / e->restart;
    e->whole_segments = columns % e->restart == 0;
    e->first = first;
    e->last = last;
    e->segment = -1;
    e->start = malloc((e->segments + 1) * sizeof *e->start);
    e->bytes = malloc(size - header->scan + PADDING);
    if (!e->start || !e->bytes)
        return NO_MEMORY;
    if (unstuff(e, data + header->scan, data + size) != DONE)
        return UNUSUAL;
    for (int c = 0; c < codec->comps_in_scan; c++) {
        const jpeg_component_info *component = codec->cur_comp_info[c];
        make_table(&e->dc[component->dc_tbl_no], codec->dc_huff_tbl_ptrs[component->dc_tbl_no], 1);
        make_table(&e->ac[component->ac_tbl_no], codec->ac_huff_tbl_ptrs[component->ac_tbl_no], 0);
    }
    codec->client_data = e;
    codec->entropy->decode_mcu = decode_mcu;
    return DONE;
}

void entropy_free(struct entropy *entropy) {
    if (!entropy)
        return;
    free(entropy->start), free(entropy->bytes);
    free(entropy);
}
