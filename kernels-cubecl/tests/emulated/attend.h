// Runs attention and the merging of chunks for the sizes of the command line, against the definition in double precision.
//
// Arguments: the queries T of a sequence, positions S of the cache, positions of a chunk, and the valid positions of
// each sequence. The cache is not a number where it is not valid.

// Means: a row's query chooses, by one of the rotated channels, positions whose score is 1024; others have zero. So
// weights are zeros and ones, and latents integers: results are exact. Choices: all channels of queries and keys are
// small integers, times 1024 for scores, so that the best position alone counts, or equally those that are as good.
// Any: weights between zero and one.
enum Numbers { MEANS, CHOICES, ANY };
static const char *const names[] = {"means", "choices", "any"};

static unsigned state;
static int random_below(int below) {
    state = state * 1664525 + 1013904223;
    return (state >> 16) % below;
}

static std::vector<Bf16> numbers(long count, int most, float unit) {
    std::vector<Bf16> out(count);
    for (Bf16 &value : out) value = (random_below(2 * most + 1) - most) * unit;
    return out;
}

// A copy that starts at a multiple of 16 bytes, as memory of a device does.
template <class To, class From> To *aligned(const std::vector<From> &values) {
    long bytes = (values.size() * sizeof(From) + 15) / 16 * 16;
    void *out = std::aligned_alloc(16, bytes + 16);
    std::memcpy(out, values.data(), values.size() * sizeof(From));
    return static_cast<To *>(out);
}

// The kernels' scalars in order, and the number of elements of the buffer of this number, `lengths`.
template <class Info> void set_sizes(Info &info, long queries, long positions, long chunks, long chunk, int buffer, long length) {
    info.scalars_usize[0] = queries, info.scalars_usize[1] = positions;
    info.scalars_usize[2] = chunks, info.scalars_usize[3] = chunk;
    info.static_meta[buffer] = length;
}

static long check(Numbers kind, long queries, long positions, long chunk, const std::vector<int> &lengths) {
    long batch = lengths.size(), rows = queries * HEADS, chunks = (positions + chunk - 1) / chunk;
    state = 7 + kind;
    bool any = kind == ANY;
    auto q_latent = numbers(batch * rows * LATENT, any ? 64 : kind == CHOICES ? 1 : 0, any ? 1 / 2048.0f : 1024);
    auto q_pe = numbers(batch * rows * ROPE, any ? 64 : 1, any ? 1 / 2048.0f : 1024);
    auto c_kv = numbers(batch * positions * LATENT, any ? 64 : 2, any ? 1 / 64.0f : 1);
    auto k_pe = numbers(batch * positions * ROPE, any ? 64 : 1, any ? 1 / 64.0f : 1);
    if (kind == MEANS) {
        for (long at = 0; at < batch * rows * ROPE; ++at) q_pe[at] = at % ROPE == at / ROPE % ROPE ? 1024 : 0;
        for (Bf16 &value : k_pe) value = random_below(2);
    }
    for (long b = 0; b < batch; ++b)
        for (long key = std::max(lengths[b], 0); key < positions; ++key) {
            for (long i = 0; i < LATENT; ++i) c_kv[(b * positions + key) * LATENT + i] = NAN;
            for (long i = 0; i < ROPE; ++i) k_pe[(b * positions + key) * ROPE + i] = NAN;
        }

    const float unwritten = -777;
    long parts = batch * rows * chunks;
    std::vector<float> sums(parts * LATENT + 64, unwritten), softmax(parts * 2 + 64, unwritten);
    std::vector<Bf16> out(batch * rows * LATENT + 64, Bf16(unwritten));
    std::vector<int> lengths_and_more(lengths);
    auto *sums_out = reinterpret_cast<attend::float_2 *>(sums.data());
    auto *softmax_out = reinterpret_cast<attend::float_2 *>(softmax.data());
    unsigned row_tiles = (rows + ROWS - 1) / ROWS;
    {
        using namespace attend;
        info_st info{};
        set_sizes(info, queries, positions, chunks, chunk, 4, batch);
        auto *a = aligned<uint32_t_4>(q_latent), *b = aligned<uint32_t_4>(q_pe);
        auto *c = aligned<uint32_t_4>(c_kv), *d = aligned<uint32_t_4>(k_pe);
        int *lengths = lengths_and_more.data();
        // A cube more than there is work for.
        bf16::run(batch * chunks * row_tiles + 1, ATTEND_THREADS,
                       [=] { ATTEND(a, b, c, d, lengths, sums_out, softmax_out, info); });
    }
    {
        using namespace merge;
        info_st info{};
        set_sizes(info, queries, positions, chunks, chunk, 2, batch);
        float *a = sums.data(), *b = softmax.data();
        int *lengths = lengths_and_more.data();
        Bf16 *to = out.data();
        bf16::run(batch * rows, MERGE_THREADS, [=] { MERGE(a, b, lengths, to, info); });
    }

    long wrong = 0;
    double furthest = 0;
    for (long b = 0; b < batch; ++b)
        for (long row = 0; row < rows; ++row) {
            long seen = std::min(std::max(lengths[b] + row / HEADS + 1 - queries, 0l), positions);
            const Bf16 *q = &q_latent[(b * rows + row) * LATENT], *rotated = &q_pe[(b * rows + row) * ROPE];
            std::vector<double> scores(seen);
            double highest = -INFINITY, total = 0;
            for (long key = 0; key < seen; ++key) {
                double score = 0;
                for (long i = 0; i < LATENT; ++i) score += double(q[i]) * c_kv[(b * positions + key) * LATENT + i];
                for (long i = 0; i < ROPE; ++i) score += double(rotated[i]) * k_pe[(b * positions + key) * ROPE + i];
                scores[key] = score;
                highest = std::max(highest, score);
            }
            for (double &score : scores) total += score = std::exp(score - highest);
            for (long i = 0; i < LATENT; ++i) {
                double expected = 0;
                for (long key = 0; key < seen; ++key)
                    expected += scores[key] * c_kv[(b * positions + key) * LATENT + i];
                if (seen) expected /= total;
                float found = out[(b * rows + row) * LATENT + i];
                // Latents of `ANY` are at most one. Weights, in numerator and denominator, and the result are rounded
                // by 2^-9 of themselves at most; a thousand roundings of 2^-24 of single precision are less than 1e-4.
                double away = std::abs(found - expected), most = any ? 3 / 512.0 + 1e-4 : 0;
                if (!any) away = found != float(Bf16(float(expected)));
                furthest = std::max(furthest, away);
                if (!(away <= most) && wrong++ == 0)
                    std::printf("sequence %ld, row %ld, channel %ld is %g, expected %g\n", b, row, i, found, expected);
            }
        }
    for (long at = 0; at < 64; ++at)
        if (sums[parts * LATENT + at] != unwritten || softmax[parts * 2 + at] != unwritten ||
            float(out[batch * rows * LATENT + at]) != float(Bf16(unwritten)))
            fail("an element beyond the results was written");
    std::printf("%s: %ld wrong, %g at most\n", names[kind], wrong, furthest);
    return wrong;
}

int main(int count, char **arguments) {
    std::vector<int> lengths;
    for (int at = 4; at < count; ++at) lengths.push_back(std::atoi(arguments[at]));
    long wrong = 0;
    for (Numbers kind : {MEANS, CHOICES, ANY})
        wrong += check(kind, std::atoi(arguments[1]), std::atoi(arguments[2]), std::atoi(arguments[3]), lengths);
    return wrong != 0;
}
