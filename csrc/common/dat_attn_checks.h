// Checks of dat_attn's arguments, shared by all backends.
#pragma once

#include <cmath>

#include "common/checks.h"

namespace mmdeform {

// Checks shapes, dtypes, devices and the scale.
inline void check_dat_attn(const Tensor& query, const Tensor& key, const Tensor& value,
                           const Tensor& positions, const Tensor& table, double scale) {
  // Rows and columns are 32-bit integers in kernels, and exact in fp32.
  constexpr int64_t kLimit = 1 << 24;
  check_dim("query", query, 5);
  const int64_t batch = query.size(0), heads = query.size(1), channels = query.size(2);
  STD_TORCH_CHECK(channels > 0 && query.size(3) < kLimit && query.size(4) < kLimit,
                  "query: expected at least one channel and fewer than 2**24 rows and columns, "
                  "got shape ",
                  shape_string(query.sizes()));
  check_dim("key", key, 4);
  const int64_t keys = key.size(3);
  check_shape("key", key, {batch, heads, channels, keys});
  STD_TORCH_CHECK(keys > 0, "key: expected at least one key, got shape ",
                  shape_string(key.sizes()));
  check_shape("value", value, {batch, heads, channels, keys});
  check_dim("positions", positions, 4);
  const int64_t groups = positions.size(1);
  check_shape("positions", positions, {batch, groups, keys, 2});
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "positions: expected groups that divide the ",
                  heads, " heads of query, got ", groups);
  check_dim("table", table, 3);
  check_shape("table", table, {heads, table.size(1), table.size(2)});
  STD_TORCH_CHECK(
      table.size(1) > 0 && table.size(2) > 0 && table.size(1) < kLimit && table.size(2) < kLimit,
      "table: expected at least one cell and fewer than 2**24 rows and columns, "
      "got shape ",
      shape_string(table.sizes()));
  check_dtype("key", key, query.scalar_type(), "query");
  check_dtype("value", value, query.scalar_type(), "query");
  check_coordinate_dtype("positions", positions, query.scalar_type());
  check_dtype("table", table, positions.scalar_type(), "positions");
  check_same_device("key", key, query);
  check_same_device("value", value, query);
  check_same_device("positions", positions, query);
  check_same_device("table", table, query);
  STD_TORCH_CHECK(std::isfinite(scale), "scale: expected a finite number, got ", scale);
}

// Checks what the backward pass has beside the arguments.
inline void check_dat_attn_grad(const Tensor& grad_output, const Tensor& query,
                                const Tensor& output, const Tensor& logsumexp) {
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t height = query.size(3), width = query.size(4);
  check_shape("grad_output", grad_output, {batch, heads, query.size(2), height, width});
  check_shape("output", output, {batch, heads, query.size(2), height, width});
  check_shape("logsumexp", logsumexp, {batch, heads, height, width});
  check_dtype("grad_output", grad_output, query.scalar_type(), "query");
  check_dtype("output", output, query.scalar_type(), "query");
  STD_TORCH_CHECK(logsumexp.scalar_type() == accumulation_type(query.scalar_type()),
                  "logsumexp: expected ",
                  torch::headeronly::toString(accumulation_type(query.scalar_type())), ", got ",
                  torch::headeronly::toString(logsumexp.scalar_type()));
  check_same_device("grad_output", grad_output, query);
  check_same_device("output", output, query);
  check_same_device("logsumexp", logsumexp, query);
}

}  // namespace mmdeform
