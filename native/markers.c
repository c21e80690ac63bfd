/* JPEG markers: what a file is, and cutting a smaller JPEG out of one with restart markers. */
#include "native.h"
#include <stdlib.h>
#include <string.h>

static int big_endian(const uint8_t *at) { return at[0] << 8 | at[1]; }

/* Frame header of a baseline JPEG; `at` is its first byte after the length. */
static int read_frame(const uint8_t *at, int length, struct header *header) {
    if (length < 8 || at[0] != 8)
        return UNUSUAL;
    header->height = big_endian(at + 1);
    header->width = big_endian(at + 3);
    header->components = at[5];
    if ((header->components != 1 && header->components != 3) || length != 8 + 3 * header->components || !header->height ||
        !header->width)
        return UNUSUAL;
    int most_x = 1, most_y = 1;
    for (int c = 0; c < header->components; c++) {
        int x = at[7 + 3 * c] >> 4, y = at[7 + 3 * c] & 15;
        if (x < 1 || x > 4 || y < 1 || y > 4)
            return UNUSUAL;
        if (header->components == 3) { /* one component alone is stored block by block, whatever it says here */
            most_x = x > most_x ? x : most_x;
            most_y = y > most_y ? y : most_y;
        }
    }
    header->mcu_width = 8 * most_x;
    header->mcu_height = 8 * most_y;
    return DONE;
}

/* DONE for an 8-bit baseline JPEG of one scan with 1 or 3 components that ends with its end marker. */
int read_header(const uint8_t *data, size_t size, struct header *header) {
    memset(header, 0, sizeof *header);
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8 || data[size - 2] != 0xFF || data[size - 1] != 0xD9)
        return UNUSUAL;
    size_t at = 2;
    while (at + 4 <= size && data[at] == 0xFF) {
        int marker = data[at + 1];
        if (marker == 0xFF) { /* padding */
            at++;
            continue;
        }
        int length = big_endian(data + at + 2);
        if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9) || length < 2 || at + 2 + length > size)
            return UNUSUAL;
        const uint8_t *content = data + at + 4;
        if (marker == 0xC0 || marker == 0xC1) {
            if (header->frame || read_frame(content, length, header) != DONE)
                return UNUSUAL;
            header->frame = at + 5;
        } else if (marker >= 0xC2 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8) {
            return UNUSUAL; /* progressive, lossless, arithmetic coding */
        } else if (marker == 0xDD) {
            if (length != 4)
                return UNUSUAL;
            header->restart = big_endian(content);
        } else if (marker == 0xDA) {
            if (!header->frame || length != 6 + 2 * header->components || content[0] != header->components)
                return UNUSUAL; /* several scans, or nonsense */
            header->scan = at + 2 + length;
            return DONE;
        }
        at += 2 + length;
    }
    return UNUSUAL;
}

/* A rectangle of restart segments. */
struct segments { int x0, x1, y0, y1, per_row; };

/* Copies the segments that `want` names, with their restart markers counted anew; 0 if the markers are not as declared. */
static size_t copy_segments(const uint8_t *at, const uint8_t *end, struct segments want, uint8_t *out) {
    uint8_t *to = out;
    const uint8_t *start = at;
    int written = 0;
    for (int number = 0, x = 0, y = 0;; number++) {
        int marker = 0;
        for (at = start; at + 1 < end; at += 2) { /* to the marker that ends this segment */
            at = memchr(at, 0xFF, end - 1 - at);
            if (!at)
                return 0;
            if ((marker = at[1]) != 0)
                break;
        }
        if (marker != 0xD9 && marker != 0xD0 + number % 8)
            return 0;
        if (y >= want.y0 && x >= want.x0 && x < want.x1) {
            if (written) {
                *to++ = 0xFF;
                *to++ = 0xD0 + (written - 1) % 8;
            }
            memcpy(to, start, at - start);
            to += at - start;
            written++;
            if (y == want.y1 - 1 && x == want.x1 - 1)
                break;
        }
        if (marker == 0xD9)
            return 0; /* fewer segments than the picture has */
        start = at + 2;
        if (++x == want.per_row)
            x = 0, y++;
    }
    *to++ = 0xFF;
    *to++ = 0xD9;
    return to - out;
}

static void put_size(uint8_t *at, int height, int width) {
    at[0] = height >> 8, at[1] = height & 255, at[2] = width >> 8, at[3] = width & 255;
}

/* Each restart segment can be decoded by itself, so those outside the box x0..x1, y0..y1 need not be looked at.
 * UNUSUAL, with *out == NULL: no markers, or not a whole number of segments per row of MCUs. */
int splice(const uint8_t *data, size_t size, const struct header *header, int x0, int y0, int x1, int y1, uint8_t **out,
           size_t *out_size, int *left, int *top) {
    int columns = (header->width + header->mcu_width - 1) / header->mcu_width;
    int rows = (header->height + header->mcu_height - 1) / header->mcu_height;
    if (!header->restart || columns % header->restart)
        return UNUSUAL;
    int step = header->restart * header->mcu_width; /* pixels per segment */
    struct segments want = {
        .x0 = (x0 > 0 ? x0 : 0) / step, .y0 = (y0 > 0 ? y0 : 0) / header->mcu_height,
        .x1 = (x1 + step - 1) / step, .y1 = (y1 + header->mcu_height - 1) / header->mcu_height,
        .per_row = columns / header->restart,
    };
    want.x1 = want.x1 < want.per_row ? want.x1 : want.per_row;
    want.y1 = want.y1 < rows ? want.y1 : rows;

    uint8_t *part = malloc(size + 2); /* the segments and their markers are no longer than they were */
    if (!part)
        return NO_MEMORY;
    memcpy(part, data, header->scan);
    size_t length = copy_segments(data + header->scan, data + size, want, part + header->scan);
    if (!length) {
        free(part);
        return UNUSUAL;
    }
    *left = want.x0 * step;
    *top = want.y0 * header->mcu_height;
    int width = want.x1 == want.per_row ? header->width - *left : (want.x1 - want.x0) * step;
    int height = want.y1 == rows ? header->height - *top : (want.y1 - want.y0) * header->mcu_height;
    put_size(part + header->frame, height, width);
    *out = part;
    *out_size = header->scan + length;
    return DONE;
}
