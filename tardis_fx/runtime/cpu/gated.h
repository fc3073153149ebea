// The gated half of kernel.cpp, which includes it: what is computed is specified by `correct` in reference_gated.py.
//
// A neuron has two rows, gate and up, and two estimates; its codes lie one behind the other. A call has the pointers of a
// plain one, of which `w1` is up and `b1`, `lower`, `upper`, `slope`, `intercept` are not used.

struct GatedCall : Call {  // gated.py packs it: four pointers and an integer more
  static constexpr int PROJECTIONS = 2;
  const void* gate;
  const float *biases, *guard, *surrogate;  // [capacity, 2] or null, [capacity, 4], [capacity, 3]
  int64_t gate_stride;
};

// What a plane misses of a product.
float beyond_plane(const GatedCall& call, const float* plane, float g, float u) {
  return activate(g, call.activation) * u - (plane[0] * g + plane[1] * u + plane[2]);
}

// As `test`: the estimates of gate and up are kept, biases added, [guarded, 2, tokens].
template <int BITS>
Outlier* test_gated(const GatedCall& call, const Inputs& x, int64_t begin, int64_t end, Outlier* list,
                    float* estimates) {
  const int64_t groups = x.row.groups, packed_bytes = x.blocks * (BITS * BLOCK / 8);
  const int64_t together = 1 + 63 / (2 * groups);  // neurons whose scales are converted at once
  std::vector<float> scales(together * 2 * groups + LANES), shifts(together * 2 * groups + LANES);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = (row - begin) % together * 2 * groups;
    if (at == 0) {
      const Half* const scale = call.scale + row * 2 * groups;
      const uint8_t* const zero = call.zero + row * 2 * groups;
      const int64_t size = std::min(together, end - row) * 2 * groups;
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES) {
        put(load(scale + i), &scales[i]);
        put(load(scale + i) * load(zero + i), &shifts[i]);
      }
      for (; i < size; ++i) shifts[i] = (scales[i] = to_float(scale[i])) * zero[i];
    }
    float both[2][TOKENS];
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const packed = call.codes + (2 * row + half) * packed_bytes;
      const float *const scale = &scales[at + half * groups], *const shift = &shifts[at + half * groups];
      estimate_all<BITS>(packed, scale, shift, x, call.tokens, both[half]);
      if (call.biases)
        for (int64_t t = 0; t < call.tokens; ++t) both[half][t] += call.biases[2 * row + half];
    }
    const float* const guard = call.guard + 4 * row;
    uint32_t tokens = 0;
    for (int64_t t = 0; t < call.tokens; ++t)
      tokens |= uint32_t(std::fabs(beyond_plane(call, guard, both[0][t], both[1][t])) > guard[3]) << t;
    if (!tokens) continue;
    *list++ = {int32_t(row), tokens};
    for (int half = 0; half < 2; ++half)
      std::copy_n(both[half], call.tokens, estimates + (2 * row + half) * call.tokens);
  }
  return list;
}

constexpr decltype(test_gated<1>)* GATED_TESTS[] = {test_gated<1>, test_gated<2>, test_gated<3>, test_gated<4>,
                                                    test_gated<5>, test_gated<6>, test_gated<7>, test_gated<8>};

Outlier* find(const GatedCall& call, const Inputs& x, int64_t begin, int64_t end, Outlier* list, float* estimates) {
  return GATED_TESTS[call.bits - 1](call, x, begin, end, list, estimates);
}

// As `add_coded`. The outlier's estimates, [2, tokens], become its pre-activations, and the first of them its residuals.
void add_coded(const GatedCall& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float* both,
               float* sums) {
  const auto *const gate = (const uint8_t*)call.gate, *const up = (const uint8_t*)call.w1,
             *const w2t = (const uint8_t*)call.w2t;
  prefetch(gate + next * call.gate_stride, x.row.bytes(call.low_bits));
  prefetch(up + next * call.w1_stride, x.row.bytes(call.low_bits));
  prefetch(w2t + next * call.w2t_stride, Row(call.d_out, call.d_out_groups).bytes(call.row_bits));
  REFINE[call.low_bits - 1](call, x, outlier.tokens, gate + neuron * call.gate_stride, both);
  REFINE[call.low_bits - 1](call, x, outlier.tokens, up + neuron * call.w1_stride, both + call.tokens);
  for (int64_t t = 0; t < call.tokens; ++t)
    if (outlier.tokens >> t & 1)
      both[t] = beyond_plane(call, call.surrogate + 3 * outlier.position, both[t], both[call.tokens + t]);
  ADD_COLUMN[call.row_bits - 1](call, outlier.tokens, w2t + neuron * call.w2t_stride, both, sums);
}

// As `add_plain`.
template <class W>
void add_plain(const GatedCall& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float* sums) {
  const W *const gate = (const W*)call.gate + neuron * call.gate_stride,
                *const up = (const W*)call.w1 + neuron * call.w1_stride,
                *const column = (const W*)call.w2t + neuron * call.w2t_stride;
  const float* const biases = call.biases ? call.biases + 2 * outlier.position : nullptr;
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (!(outlier.tokens >> t & 1)) continue;
    const Factor<W>* const token = x.token<W>(t, call.d);
    const float g = dot(gate, token, call.d, up) + (biases ? biases[0] : 0);
    const float u = dot(up, token, call.d, column) + (biases ? biases[1] : 0);
    add_scaled(sums + t * call.d_out, beyond_plane(call, call.surrogate + 3 * outlier.position, g, u), column,
               call.d_out, (const W*)call.gate + next * call.gate_stride);
  }
}

template <class W>
void add(const GatedCall& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float* estimates,
         float* sums) {
  if (call.row_bits == 16)
    add_plain<W>(call, x, outlier, neuron, next, sums);
  else
    add_coded(call, x, outlier, neuron, next, estimates, sums);
}
