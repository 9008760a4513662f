// Logits to class ids at each photo's own size, on a GPU: what upsampling.py does on a CPU.
//
// One bilinear interpolation with half-pixel centres (align_corners=False), then the argmax. Each
// thread makes one pixel and writes only its id and confidence: the interpolated logits stay in
// registers. A photo's logits are small enough that reads come from cache. At most 256 classes.
//
// NVRTC compiles this when the service starts (cuda.py), for the GPU that it finds. The tests
// compile it with a C++ compiler and compare it with upsampling.py.

// Consecutive pixels of one photo, row by row. Field by field the same as PIECE in lanes.py.
struct Piece {
    unsigned long long logits;      // where the photo's (C, grid_height, grid_width) start, in floats
    unsigned long long ids;         // where the pixels' class ids go, in bytes
    unsigned long long confidence;  // where their confidences go; NO_CONFIDENCE for nowhere
    double row_step;                // logits per pixel
    double column_step;
    unsigned first;                 // the first pixel
    unsigned pixels;
    unsigned width;                 // of the photo
    int grid_height;
    int grid_width;
};

#define NO_CONFIDENCE (~0ull)

// The two logits around a pixel along one axis, and the weight of the second one.
struct Sample {
    int before;
    int after;
    float weight;
};

static __device__ Sample sample(unsigned pixel, double step, int size) {
    // Double: in float, the last pixels of large photos would be off by more than rounding.
    double position = (pixel + 0.5) * step - 0.5;
    position = position < 0.0 ? 0.0 : position;
    position = position > size - 1 ? size - 1 : position;
    Sample found;
    found.before = (int)position;
    found.after = found.before + 1 < size ? found.before + 1 : found.before;
    found.weight = (float)(position - found.before);
    return found;
}

static __device__ float interpolate(const float* plane, Sample row, Sample column, int width) {
    const float* above = plane + row.before * width;
    const float* below = plane + row.after * width;
    const float top =
        above[column.before] + column.weight * (above[column.after] - above[column.before]);
    const float bottom =
        below[column.before] + column.weight * (below[column.after] - below[column.before]);
    return top + row.weight * (bottom - top);
}

// blockIdx.y is the piece; x covers the largest one.
extern "C" __global__ void upsample(const Piece* pieces, const float* logits, int classes,
                                    unsigned char* out) {
    const Piece piece = pieces[blockIdx.y];
    const unsigned nth = blockIdx.x * blockDim.x + threadIdx.x;
    if (nth >= piece.pixels) return;

    const unsigned pixel = piece.first + nth;
    const Sample row = sample(pixel / piece.width, piece.row_step, piece.grid_height);
    const Sample column = sample(pixel % piece.width, piece.column_step, piece.grid_width);
    const int plane = piece.grid_height * piece.grid_width;
    const float* photo = logits + piece.logits;

    int id = 0;
    float best = interpolate(photo, row, column, piece.grid_width);
    for (int c = 1; c < classes; ++c) {
        const float value = interpolate(photo + c * plane, row, column, piece.grid_width);
        // Ties and NaN go to the lower id.
        if (value > best) {
            best = value;
            id = c;
        }
    }
    out[piece.ids + nth] = (unsigned char)id;

    if (piece.confidence == NO_CONFIDENCE) return;
    float total = 0.0f;
    for (int c = 0; c < classes; ++c)
        total += expf(interpolate(photo + c * plane, row, column, piece.grid_width) - best);
    // The total includes the winner's own share of 1, so this is 255 at most; NaN becomes 0.
    out[piece.confidence + nth] = total >= 1.0f ? (unsigned char)(255.0f / total + 0.5f) : 0;
}
