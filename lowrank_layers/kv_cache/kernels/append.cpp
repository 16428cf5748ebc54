// One token to the end of the recent ones, keys and values, if all of its numbers are finite.

#include <cstdint>
#include <cstring>

namespace {

bool finite(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most < 0x7f800000;  // all bits of the exponent
}

}  // namespace

extern "C" int64_t append_token(
    const float* keys, const float* values,  // [rows, size]
    float* key_buffer, float* value_buffer,  // [rows, room, size]
    int64_t tokens, int64_t room, int64_t rows, int64_t size, int64_t value_size) {
  if (!finite(keys, rows * size) || !finite(values, rows * value_size)) return 0;
  for (int64_t row = 0; row < rows; row++) {
    std::memcpy(key_buffer + (row * room + tokens) * size, keys + row * size, size * sizeof(float));
    std::memcpy(value_buffer + (row * room + tokens) * value_size, values + row * value_size, value_size * sizeof(float));
  }
  return 1;
}
