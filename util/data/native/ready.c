/* Try this library out with the libjpeg that was loaded at run time. */
#include "native.h"
#include <stdlib.h>
#include <string.h>

#define SIDE 40

static int make_jpeg(struct jpeg_compress_struct *codec, unsigned char **data, unsigned long *size) {
    uint8_t row[3 * SIDE], *rows = row;
    jpeg_mem_dest(codec, data, size);
    codec->image_width = codec->image_height = SIDE;
    codec->input_components = 3;
    codec->in_color_space = JCS_RGB;
    jpeg_set_defaults(codec);
    codec->restart_interval = 1;
    jpeg_start_compress(codec, TRUE);
    for (int y = 0; y < SIDE; y++) {
        for (int i = 0; i < 3 * SIDE; i++)
            row[i] = (uint8_t)(y * y * 3 + i * (y + 7) * 5);
        jpeg_write_scanlines(codec, &rows, 1);
    }
    jpeg_finish_compress(codec);
    return DONE;
}

/* Return DONE if libjpeg is the version that this file was compiled for, and if our entropy decoder gives the same
 * pixels as its own. */
int native_ready(void) {
    struct jpeg_compress_struct codec = { 0 };
    struct failure failure;
    unsigned char *volatile data = NULL;
    volatile unsigned long size = 0;
    volatile int status = UNUSUAL;
    codec.err = quiet_errors(&failure);
    if (!setjmp(failure.escape)) {
        unsigned char *made = NULL;
        unsigned long made_size = 0;
        jpeg_create_compress(&codec); /* checks the version and the size of the structure */
        status = make_jpeg(&codec, &made, &made_size);
        data = made;
        size = made_size;
    }
    jpeg_destroy_compress(&codec);
    uint8_t ours[3 * SIDE * SIDE], theirs[3 * SIDE * SIDE];
    const int32_t box[4] = { 18, 17, 20, 22 };
    if (status == DONE)
        status = native_crop(data, size, box, ours, SIDE, SIDE, 0);
    if (status == DONE)
        status = native_crop(data, size, box, theirs, SIDE, SIDE, LIBJPEGS_ENTROPY);
    free(data);
    return status == DONE && memcmp(ours, theirs, sizeof ours) ? UNUSUAL : status;
}
