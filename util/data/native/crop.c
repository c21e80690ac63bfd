/* Decode only what a crop needs, and resize it row by row. */
#include "native.h"
#include <stdlib.h>

#ifndef SOURCE_ID
#define SOURCE_ID "unknown"
#endif

#define MARGIN 2 /* pixels around the crop: libjpeg upsamples chroma differently at the edge of what it decodes */
#define LARGEST (1 << 26) /* pixels of a side; LARGEST_SIDE in bindings.py */

static void escape(j_common_ptr codec) { longjmp(((struct failure *)codec->err)->escape, 1); }

static void count_warning(j_common_ptr codec, int level) {
    if (level < 0)
        codec->err->num_warnings++;
}

struct jpeg_error_mgr *quiet_errors(struct failure *failure) {
    jpeg_std_error(&failure->base);
    failure->base.error_exit = escape;
    failure->base.emit_message = count_warning;
    return &failure->base;
}

const char *native_source_id(void) { return SOURCE_ID; }

/* Write width and height to out[0] and out[1], for a JPEG that `native_crop` can read: 8 bits, grey or YCbCr, baseline,
 * complete. */
int native_size(const uint8_t *data, size_t size, int32_t *out) {
    struct header header;
    int status = read_header(data, size, &header);
    if (status == DONE) {
        out[0] = header.width;
        out[1] = header.height;
    }
    return status;
}

static int down(double x) { return (int)x; } /* boxes are not negative */

static int up(double x) { return (int)x + (x > (int)x); }

/* Everything that must be released, however the decoding ends. */
struct job {
    struct jpeg_decompress_struct codec;
    struct failure failure;
    struct resizer *resizer;
    struct entropy *entropy;
};

/* Decode the rows of `box` into job->resizer, and write its result to `out`. Errors of libjpeg leave by longjmp. */
static int decode(struct job *job, const uint8_t *data, size_t size, const struct header *header, struct box box,
                  int shrink, uint8_t *out, int out_width, int out_height, int flags) {
    j_decompress_ptr codec = &job->codec;
    jpeg_mem_src(codec, (unsigned char *)data, size);
    jpeg_read_header(codec, TRUE);
    if (codec->jpeg_color_space != JCS_YCbCr && codec->jpeg_color_space != JCS_GRAYSCALE)
        return UNUSUAL;
    codec->out_color_space = JCS_EXT_RGBX; /* four bytes per pixel: one vector element each */
    codec->dct_method = JDCT_ISLOW;
    codec->scale_num = 1;
    codec->scale_denom = shrink;
    jpeg_start_decompress(codec);

    box.left /= shrink, box.top /= shrink, box.width /= shrink, box.height /= shrink;
    int in_width = codec->output_width, in_height = codec->output_height;
    int first = down(box.left) > MARGIN ? down(box.left) - MARGIN : 0;
    int last = up(box.left + box.width) + MARGIN < in_width ? up(box.left + box.width) + MARGIN : in_width;
    JDIMENSION left = first, width = last - first;
    if (last - first < in_width)
        jpeg_crop_scanline(codec, &left, &width); /* moves `left` to a multiple of the MCU's width */
    if (!(flags & LIBJPEGS_ENTROPY)) {
        int step = header->mcu_width / shrink; /* an MCU has 8 pixels or more, and shrink is 8 at most */
        int status = entropy_attach(&job->entropy, codec, data, size, header, left / step,
                                    (left + codec->output_width - 1) / step);
        if (status != DONE)
            return status;
    }
    int top = down(box.top), bottom = up(box.top + box.height);
    bottom = bottom < in_height ? bottom : in_height;
    box.left -= left;
    box.top -= top;
    job->resizer = resizer_new(box, codec->output_width, bottom - top, out_width, out_height, flags);
    if (!job->resizer)
        return NO_MEMORY;

    if (top > 0 && jpeg_skip_scanlines(codec, top) != (JDIMENSION)top)
        return UNUSUAL;
    for (int y = 0; y < bottom - top; y++) {
        uint8_t *row = resizer_input(job->resizer, y);
        if (jpeg_read_scanlines(codec, &row, 1) != 1)
            return UNUSUAL;
        resizer_row(job->resizer, y);
    }
    if (job->failure.base.num_warnings)
        return UNUSUAL; /* damaged: the general decoder decides what it shows */
    resizer_finish(job->resizer, out);
    return DONE;
}

/* Tell whether the box lies in the image, and whether all sizes in bytes, also of filters, fit in an int. */
static int possible(const int32_t *box, int image_width, int image_height, int out_width, int out_height) {
    int x = box[0], y = box[1], width = box[2], height = box[3];
    return image_width <= LARGEST && image_height <= LARGEST && out_width >= 1 && out_width <= LARGEST &&
           out_height >= 1 && out_height <= LARGEST && x >= 0 && y >= 0 && width >= 1 && height >= 1 &&
           width <= image_width - x && height <= image_height - y;
}

/* Cut `box` = left, top, width, height from a JPEG, resize it by an antialiased bicubic filter and flip it.
 * out: (3, out_height, out_width). Thread-safe; no state is kept between calls. */
int native_crop(const uint8_t *data, size_t size, const int32_t *box, uint8_t *out, int out_width, int out_height,
                int flags) {
    struct header header;
    if (read_header(data, size, &header) != DONE)
        return UNUSUAL;
    if (!possible(box, header.width, header.height, out_width, out_height))
        return UNUSUAL;
    int x = box[0], y = box[1], width = box[2], height = box[3];
    int shrink = 1;
    while (flags & DCT_SCALING && shrink < 8 && width >= 2 * shrink * out_width && height >= 2 * shrink * out_height)
        shrink *= 2;

    struct job *job = calloc(1, sizeof *job); /* on the heap: its fields stay defined after a longjmp */
    if (!job)
        return NO_MEMORY;
    volatile int status = UNUSUAL;
    job->codec.err = quiet_errors(&job->failure);
    if (!setjmp(job->failure.escape)) {
        struct box exact = { x, y, width, height };
        jpeg_create_decompress(&job->codec);
        status = decode(job, data, size, &header, exact, shrink, out, out_width, out_height, flags);
    }
    jpeg_destroy_decompress(&job->codec);
    entropy_free(job->entropy);
    resizer_free(job->resizer);
    free(job);
    return status;
}

/* Cut, resize and flip decoded pixels in the same way. planes: (3, image_height, image_width). */
int native_crop_pixels(const uint8_t *planes, int image_height, int image_width, const int32_t *box,
                       uint8_t *out, int out_width, int out_height, int flags) {
    if (!possible(box, image_width, image_height, out_width, out_height))
        return UNUSUAL;
    int x = box[0], y = box[1], width = box[2], height = box[3];
    struct box whole = { 0, 0, width, height };
    struct resizer *resizer = resizer_new(whole, width, height, out_width, out_height, flags);
    if (!resizer)
        return NO_MEMORY;
    size_t plane = (size_t)image_width * image_height;
    for (int i = 0; i < height; i++) {
        const uint8_t *red = planes + (size_t)(y + i) * image_width + x;
        const uint8_t *green = red + plane, *blue = green + plane;
        uint8_t *row = resizer_input(resizer, i);
        for (int k = 0; k < width; k++)
            row[4 * k] = red[k], row[4 * k + 1] = green[k], row[4 * k + 2] = blue[k];
        resizer_row(resizer, i);
    }
    resizer_finish(resizer, out);
    resizer_free(resizer);
    return DONE;
}
