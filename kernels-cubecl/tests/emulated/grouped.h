// Runs a grouped product for the sizes of the command line, against exact sums.
//
// Arguments: the inner size K (of weight gradients the height) and the width N, rows behind the last segment, and the
// rows of every segment. Rows behind the last are not a number.

static unsigned state = 5;
static std::vector<Bf16> integers(long count) {
    std::vector<Bf16> out(count);
    for (Bf16 &value : out) {
        state = state * 1664525 + 1013904223;
        value = float(int((state >> 16) % 5) - 2);
    }
    return out;
}

template <class To, class From> To *aligned(const std::vector<From> &values) {
    long bytes = (values.size() * sizeof(From) + 15) / 16 * 16;
    void *out = std::aligned_alloc(16, bytes + 16);
    std::memcpy(out, values.data(), values.size() * sizeof(From));
    return static_cast<To *>(out);
}

int main(int count, char **arguments) {
    long k = std::atoi(arguments[1]), n = std::atoi(arguments[2]), rest = std::atoi(arguments[3]), experts = count - 4;
    std::vector<unsigned> rows{0}, tiles{0};
    for (int at = 4; at < count; ++at) {
        unsigned segment = std::atoi(arguments[at]);
        rows.push_back(rows.back() + segment), tiles.push_back(tiles.back() + (segment + 127) / 128);
    }
    long last = rows.back(), all = last + rest;
    rows.push_back(all), tiles.push_back(tiles.back() + (rest + 127) / 128);
    std::vector<unsigned> bounds(rows);
    bounds.insert(bounds.end(), tiles.begin(), tiles.end());

    bool of_weights = MODE == 2;
    auto a = integers(all * k), b = integers(of_weights ? all * n : experts * k * n);
    for (long at = last * k; at < all * k; ++at) a[at] = NAN;
    for (long at = last * n; of_weights && at < all * n; ++at) b[at] = NAN;

    long lines = of_weights ? experts * k : all;
    const float unwritten = -777;
    std::vector<Bf16> out(lines * n + 64, Bf16(unwritten));
    info_st info{};
    info.scalars_usize[0] = k, info.scalars_usize[1] = n;
    info.static_meta[2] = bounds.size();
    auto *left = aligned<uint32_t_4>(a), *right = aligned<uint32_t_4>(b);
    auto *to = reinterpret_cast<uint32_t *>(out.data());
    auto *where = reinterpret_cast<uint32_t *>(bounds.data());
    auto tiles_of = [](long size) { return unsigned(size + 127) / 128; };
    Index grid{tiles_of(all) + unsigned(experts), tiles_of(n), 1};
    if (of_weights) grid = {tiles_of(n), tiles_of(k), unsigned(experts)};
    gpu::run(grid, THREADS, [=] { KERNEL(left, right, where, to, info); });

    long wrong = 0;
    for (long line = 0; line < lines; ++line)
        for (long column = 0; column < n; ++column) {
            float expected = 0;
            if (of_weights) {
                long expert = line / k;
                for (long row = rows[expert]; row < rows[expert + 1]; ++row)
                    expected += float(a[row * k + line % k]) * float(b[row * n + column]);
            } else if (line < last) {
                long expert = std::upper_bound(rows.begin(), rows.end() - 1, unsigned(line)) - rows.begin() - 1;
                for (long i = 0; i < k; ++i) {
                    long at = MODE == 0 ? i * n + column : column * k + i;
                    expected += float(a[line * k + i]) * float(b[expert * k * n + at]);
                }
            }
            float found = out[line * n + column];
            if (found != float(Bf16(expected)) && wrong++ == 0)
                std::printf("element %ld, %ld is %g, expected %g\n", line, column, found, expected);
        }
    for (long at = 0; at < 64; ++at)
        if (float(out[lines * n + at]) != float(Bf16(unwritten))) fail("an element beyond the result was written");
    std::printf("%ld wrong\n", wrong);
    return wrong != 0;
}
