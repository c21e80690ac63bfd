/* Read the markers of a JPEG: its size, its components, and where the entropy-coded data begin. */
#include "native.h"
#include <string.h>

static int big_endian(const uint8_t *at) { return at[0] << 8 | at[1]; }

/* Read the frame header of a baseline JPEG. `at` is its first byte after the length. */
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
        if (header->components == 3) { /* a single component is stored block by block; its factors do not count */
            most_x = x > most_x ? x : most_x;
            most_y = y > most_y ? y : most_y;
        }
    }
    header->mcu_width = 8 * most_x;
    header->mcu_height = 8 * most_y;
    return DONE;
}

/* Return DONE for an 8-bit baseline JPEG of one scan with 1 or 3 components that ends with an end marker. */
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
                return UNUSUAL; /* several scans, or a damaged header */
            header->scan = at + 2 + length;
            /* The last two bytes of the file end the scan. They must not belong to the header. */
            return header->scan + 2 <= size ? DONE : UNUSUAL;
        }
        at += 2 + length;
    }
    return UNUSUAL;
}
