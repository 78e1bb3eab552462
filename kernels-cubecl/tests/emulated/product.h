// Runs a matrix product for the sizes M, N, K of the command line against the sums of the same numbers.
//
// Codes are integers from -2 to 2 and scales powers of two, so that every sum is exact. What is beyond the inner size
// in a row of codes is not zero, and must not count. A grouped product has the rows of the experts' segments as further
// sizes, a product of segments what each has of the inner size.
int main(int count, char **arguments) {
    gpu::make_codes();
    int m = std::atoi(arguments[1]), n = std::atoi(arguments[2]), k = std::atoi(arguments[3]);
    int blocks = (k + 127) / 128;
    // Rows of B of one matrix have blocks of their own; each tile of rows of A has the number of its matrix.
    std::vector<unsigned> tile_experts;
    int experts = 1;
    // One result below another, each of a segment of the inner size.
    int segments = 1;
    std::vector<unsigned> starts{0};
#ifdef SEGMENTS
    segments = count - 4;
    for (int segment = 0; segment < segments; ++segment)
        starts.push_back(starts.back() + (std::atoi(arguments[4 + segment]) + 127) / 128);
    unsigned *first_blocks = starts.data();
    tile_experts.resize((m + 127) / 128, 0);
#define EXPERTS first_blocks,
#elif defined(GROUPED)
    experts = count - 4;
    for (int expert = 0; expert < experts; ++expert)
        tile_experts.insert(tile_experts.end(), (std::atoi(arguments[4 + expert]) + 127) / 128, expert);
    tile_experts.resize((m + 127) / 128, experts);
    unsigned *experts_of_tiles = tile_experts.data();
#define EXPERTS experts_of_tiles,
#else
    tile_experts.resize((m + 127) / 128, 0);
#define EXPERTS
#endif
    if (starts.size() == 1) starts.push_back(blocks);
    struct Matrix {
        long rows, pitch, tile_rows;
        byte *codes;
        std::vector<float> scales, values;
    };
    auto matrix = [&](long rows, long matrices, long pitch, long tile_rows, unsigned state) {
        long matrix_rows = rows / matrices, matrix_tiles = (matrix_rows + tile_rows - 1) / tile_rows;
        auto *codes = static_cast<byte *>(std::aligned_alloc(128, (rows * pitch + 127) / 128 * 128));
        std::memset(codes, 0x38, rows * pitch);
        Matrix out{rows, pitch, tile_rows, codes, {}, {}};
        auto random = [&](unsigned below) { return (state = state * 1664525 + 1013904223) >> 16, (state >> 16) % below; };
        for (long i = 0; i < matrices * matrix_tiles * blocks; ++i)
            out.scales.push_back(std::ldexp(1.0f, int(random(4)) - 2));
        const byte integers[] = {0xc0, 0xb8, 0x00, 0x38, 0x40};
        for (long row = 0; row < rows; ++row) {
            long tile = row / matrix_rows * matrix_tiles + row % matrix_rows / tile_rows;
            for (long i = 0; i < k; ++i) {
                byte code = integers[random(5)];
                codes[row * pitch + i] = code;
                out.values.push_back(gpu::decoded[code] * out.scales[tile * blocks + i / 128]);
            }
        }
        return out;
    };
    Matrix a = matrix(m, 1, blocks * 128, 1, 1);
    Matrix b = matrix(long(experts) * n, experts, blocks * 128 + 16, B_TILE_ROWS, 2);

    const float unwritten = -777, *end;
    const long results = long(segments) * m;
    std::vector<float> y(results * n + 64, unwritten);
    auto *out = reinterpret_cast<OUTPUT *>(y.data());
    float *a_scales = a.scales.data(), *b_scales = b.scales.data();
    info_st info{};
    unsigned *scalars = reinterpret_cast<unsigned *>(info.scalars_u32);
    scalars[0] = m, scalars[1] = n, scalars[2] = k;
#ifdef COLUMNS
    auto map = [&](const Matrix &of, unsigned long long box) {
        CUtensorMap map{};
        map.opaque[0] = reinterpret_cast<unsigned long long>(of.codes);
        map.opaque[1] = of.rows, map.opaque[2] = k, map.opaque[3] = of.pitch, map.opaque[4] = box;
        return map;
    };
    static CUtensorMap a_map, b_map;
    a_map = map(a, 128), b_map = map(b, COLUMNS);
#ifdef GROUPED
    scalars[3] = experts;
#endif
    unsigned tiles = (m + 127) / 128 * ((n + COLUMNS - 1) / COLUMNS);
    gpu::run({tiles, unsigned(segments), 1}, THREADS, [=] { KERNEL(a_map, a_scales, b_map, b_scales, EXPERTS out, nullptr, info); });
#else
    scalars[3] = a.pitch / 16, scalars[4] = b.pitch / 16;
#ifdef GROUPED
    scalars[5] = experts;
#endif
    auto *a_codes = reinterpret_cast<uint32_t_4 *>(a.codes), *b_codes = reinterpret_cast<uint32_t_4 *>(b.codes);
    gpu::run({unsigned(m + 127) / 128, unsigned(n + 127) / 128, unsigned(segments)}, THREADS,
             [=] { KERNEL(a_codes, a_scales, b_codes, b_scales, EXPERTS out, info); });
#endif
    long wrong = 0;
    for (long at = 0; at < results; ++at)
        for (long column = 0; column < n; ++column) {
            double expected = 0;
            long row = at % m, segment = at / m;
            long expert = tile_experts[row / 128], b_row = expert * n + column;
            long first = starts[segment] * 128l, end = std::min<long>(starts[segment + 1] * 128l, k);
            if (expert < experts)
                for (long i = first; i < end; ++i) expected += double(a.values[row * k + i]) * b.values[b_row * k + i];
            float found = y[at * n + column];
            if (found != float(expected) && wrong++ == 0)
                std::printf("element %ld, %ld is %g, expected %g\n", at, column, found, expected);
        }
    for (end = &y[results * n]; end != y.data() + y.size(); ++end)
        if (*end != unwritten) fail("an element beyond the result was written");
    std::printf("%d x %d x %d: %ld wrong\n", m, n, k, wrong);
    return wrong != 0;
}
