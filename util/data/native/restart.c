/* Rewrite a JPEG with the same coefficients and restart markers. With markers, entropy.c steps over the segments that a
 * crop does not need. */
#include "native.h"
#include <math.h>
#include <stdlib.h>

/* Return the MCUs per segment: the divisor of a row's MCUs that is nearest to 4. Smaller segments cost bytes; larger
 * ones cost decoding outside of the crop. */
static int segment_length(int columns) {
    int best = 1;
    for (int k = 2; k <= columns; k++)
        if (columns % k == 0 && fabs(log(k / 4.0)) < fabs(log(best / 4.0)))
            best = k;
    return best;
}

struct transcoder {
    struct jpeg_decompress_struct from;
    struct jpeg_compress_struct to;
    struct failure failure;
    struct jpeg_destination_mgr destination;
    uint8_t *out;
    size_t room;
};

/* libjpeg's memory destination leaks its buffer on errors. Ours has a fixed size, and too much output is an error. */
static void start_output(j_compress_ptr codec) { (void)codec; }

static boolean output_is_full(j_compress_ptr codec) {
    codec->err->error_exit((j_common_ptr)codec);
    return FALSE;
}

static void end_output(j_compress_ptr codec) { (void)codec; }

static int transcode(struct transcoder *t, const uint8_t *data, size_t size) {
    jpeg_mem_src(&t->from, (unsigned char *)data, size);
    jpeg_read_header(&t->from, TRUE);
    if (t->from.data_precision != 8 || (t->from.num_components != 1 && t->from.num_components != 3))
        return UNUSUAL;
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(&t->from);
    if (t->failure.base.num_warnings) /* checked now, because writing begins by clearing the count */
        return UNUSUAL;
    jpeg_copy_critical_parameters(&t->from, &t->to);
    int wide = t->from.num_components == 1 ? 1 : t->from.max_h_samp_factor;
    int columns = ((int)t->from.image_width + 8 * wide - 1) / (8 * wide);
    t->to.optimize_coding = TRUE; /* saves the bytes that the markers cost */
    t->to.restart_interval = segment_length(columns);
    t->destination = (struct jpeg_destination_mgr){
        .next_output_byte = t->out, .free_in_buffer = t->room, .init_destination = start_output,
        .empty_output_buffer = output_is_full, .term_destination = end_output };
    t->to.dest = &t->destination;
    jpeg_write_coefficients(&t->to, coefficients);
    jpeg_finish_compress(&t->to);
    jpeg_finish_decompress(&t->from);
    return t->failure.base.num_warnings ? UNUSUAL : DONE;
}

/* Rewrite a JPEG of 1 or 3 components, progressive or not, as a baseline JPEG with the same coefficients and restart
 * markers, without metadata. `out` has room for `room` bytes; *out_size is the number of bytes written. */
int native_add_restarts(const uint8_t *data, size_t size, uint8_t *out, size_t room, size_t *out_size) {
    struct transcoder *t = calloc(1, sizeof *t);
    if (!t)
        return NO_MEMORY;
    t->out = out;
    t->room = room;
    volatile int status = UNUSUAL;
    t->from.err = t->to.err = quiet_errors(&t->failure);
    if (!setjmp(t->failure.escape)) {
        jpeg_create_decompress(&t->from);
        jpeg_create_compress(&t->to);
        status = transcode(t, data, size);
    }
    *out_size = room - t->destination.free_in_buffer;
    jpeg_destroy_compress(&t->to);
    jpeg_destroy_decompress(&t->from);
    free(t);
    return status;
}
