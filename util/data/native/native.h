/* From the bytes of a JPEG to a cropped, resized and flipped uint8 image. bindings.py calls these functions. */
#ifndef MAE_PL_NATIVE_H
#define MAE_PL_NATIVE_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <jpeglib.h>

/* Return values of all exported functions. After anything but DONE the caller uses the general decoder, which then
 * reads the file after all, or says what is wrong with it. */
enum { DONE = 0, UNUSUAL = 1, NO_MEMORY = 2 };

enum { FLIP_X = 1, FLIP_Y = 2, DCT_SCALING = 4, PORTABLE = 8, LIBJPEGS_ENTROPY = 16 };

/* libjpeg's error handler. It must not return; it jumps to `escape` instead of ending the process. */
struct failure {
    struct jpeg_error_mgr base; /* first, so that libjpeg's pointer is ours */
    jmp_buf escape;
};
struct jpeg_error_mgr *quiet_errors(struct failure *failure);

/* Facts from the markers before the entropy-coded data. */
struct header {
    int width, height, components;
    int mcu_width, mcu_height; /* in pixels */
    int restart;               /* MCUs between restart markers; 0 = none */
    size_t frame;              /* offset of the frame header's height */
    size_t scan;               /* offset of the entropy-coded data */
};
int read_header(const uint8_t *data, size_t size, struct header *header);

/* A box of the image, in pixels from its top left corner. After DCT scaling it can have fractions. */
struct box { double left, top, width, height; };

/* Antialiased bicubic resizing of rows that arrive one by one. */
struct resizer;
struct resizer *resizer_new(struct box box, int in_width, int in_height, int out_width, int out_height, int flags);
void resizer_free(struct resizer *resizer);
uint8_t *resizer_input(struct resizer *resizer, int y); /* where the caller writes row y: in_width RGBX pixels */
void resizer_row(struct resizer *resizer, int y);       /* row y is written; rows arrive in order */
void resizer_finish(const struct resizer *resizer, uint8_t *planes);   /* (3, out_height, out_width) */

struct entropy;
int entropy_attach(struct entropy **entropy, j_decompress_ptr codec, const uint8_t *data, size_t size,
                   const struct header *header, int first, int last);
void entropy_free(struct entropy *entropy);

int native_crop(const uint8_t *data, size_t size, const int32_t *box, uint8_t *out, int out_width, int out_height, int flags);
int native_crop_pixels(const uint8_t *planes, int image_height, int image_width, const int32_t *box,
                       uint8_t *out, int out_width, int out_height, int flags);

#endif
