#include "cpu/roi_pool_driver.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/dtypes.h"
#include "common/roi_pool_checks.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace mmdeform {
namespace {

// Pixels converted at a time, a whole number of vectors.
constexpr int64_t kChunkPixels = 256;
// Channels of a task of the backward pass: whole cache lines, so that no two threads share one.
constexpr int64_t kTaskChannels = 16;

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

// The RoIs of each image, in order.
template <typename A>
std::vector<std::vector<int64_t>> rois_of_images(const RoiPoolGeometry& g, const A* rois) {
  std::vector<std::vector<int64_t>> result(g.images);
  for (int64_t roi = 0; roi < g.rois; ++roi) {
    const A image = rois[5 * roi];
    STD_TORCH_CHECK(image >= 0 && image < A(g.images), "rois: expected image indices in [0, ",
                    g.images, "), got ", image, " in row ", roi);
    result[static_cast<int64_t>(image)].push_back(roi);
  }
  return result;
}

// The tensors of a call as the kernels want them.
template <typename T, typename C>
struct Call {
  using A = Accumulation<T>;

  const RoiPoolKernelsOf<T, C>& kernel;
  RoiPoolGeometry g;
  Tensor input, rois;
  std::optional<Tensor> offset, mask;
  RoiPoolArgs<T, C> args;
  std::vector<std::vector<int64_t>> rois_of_image;
  Tensor rows;                       // channels last, of the images that have RoIs
  std::vector<const A*> image_rows;  // by image, null where it has no RoI

  Call(const RoiPoolKernels& kernels, const RoiPoolGeometry& geometry, const RoiPoolInputs& inputs)
      : kernel(kernels),
        g(geometry),
        input(inputs.input),
        rois(torch::stable::contiguous(inputs.rois)),
        offset(contiguous(inputs.offset)),
        mask(contiguous(inputs.mask)),
        rois_of_image(rois_of_images(g, data_of<A>(rois))),
        rows(scratch(rois, scalar_type_of<A>(), 0)),
        image_rows(g.images, nullptr) {
    // Two pixels for each sample; no more samples of an adaptive grid are looked at.
    const int64_t samples = g.samples > 0 ? g.samples : 2 * std::max(g.height, g.width) + 8;
    args = {g, data_of<A>(rois), offset.has_value() ? data_of<C>(*offset) : nullptr,
            mask.has_value() ? data_of<C>(*mask) : nullptr, 2 * samples};
  }

  int64_t row_size() const { return g.pixels() * g.channels; }

  // Memory for the two axis tables of a worker.
  Tensor tables(int64_t workers) const {
    return scratch(rois, ScalarType::Byte, workers * table_bytes());
  }
  int64_t table_bytes() const { return 2 * args.table_size * (sizeof(int64_t) + 2 * sizeof(A)); }

  // Brings the images that have RoIs to rows, or finds them as rows in the input.
  void load_images() {
    if (std::is_same_v<T, A> && g.cells() == 1 && is_channels_last(input)) {
      for (int64_t image = 0; image < g.images; ++image)
        image_rows[image] = reinterpret_cast<const A*>(data_of<T>(input)) + image * row_size();
      return;
    }
    std::vector<int64_t> images;
    for (int64_t image = 0; image < g.images; ++image)
      if (!rois_of_image[image].empty()) images.push_back(image);
    input = torch::stable::contiguous(input);
    const auto count = static_cast<int64_t>(images.size());
    rows = scratch(rois, scalar_type_of<A>(), count * row_size());
    for (int64_t i = 0; i < count; ++i)
      image_rows[images[i]] = mutable_data_of<A>(rows) + i * row_size();
    const int64_t chunks = divide_up(g.pixels(), kChunkPixels);
    parallel_items(count * chunks, [&](int64_t, int64_t item) {
      const int64_t i = item / chunks, begin = item % chunks * kChunkPixels;
      kernel.image_to_rows(g, data_of<T>(input) + images[i] * row_size(), begin,
                           std::min(kChunkPixels, g.pixels() - begin),
                           mutable_data_of<A>(rows) + i * row_size());
    });
  }

  const A* rows_of_roi(int64_t roi) const {
    return image_rows[static_cast<int64_t>(args.rois[5 * roi])];
  }
};

template <typename T, typename C>
void forward(Call<T, C>& call, const Tensor& output) {
  using A = Accumulation<T>;
  const RoiPoolGeometry& g = call.g;
  const int64_t size = g.bins() * g.output_dim, workers = worker_count(g.rois);
  call.load_images();
  const Tensor tables = call.tables(workers);
  const Tensor sums = scratch(call.rois, scalar_type_of<A>(), workers * size);
  parallel_items(g.rois, [&](int64_t worker, int64_t roi) {
    call.kernel.forward(call.args, roi, call.rows_of_roi(roi),
                        mutable_data_of<char>(tables) + worker * call.table_bytes(),
                        mutable_data_of<A>(sums) + worker * size,
                        mutable_data_of<T>(output) + roi * size);
  });
}

template <typename T, typename C>
void backward_points(Call<T, C>& call, const Tensor& gradients, const RoiPoolGradients& results) {
  using A = Accumulation<T>;
  const RoiPoolGeometry& g = call.g;
  const int64_t offsets = 2 * g.classes * g.parts(), workers = worker_count(g.rois);
  call.load_images();
  const Tensor tables = call.tables(workers);
  const Tensor sums = scratch(call.rois, scalar_type_of<A>(), workers * offsets);
  C* grad_offset = call.offset.has_value() ? mutable_data_of<C>(results.offset) : nullptr;
  C* grad_mask = call.mask.has_value() ? mutable_data_of<C>(results.mask) : nullptr;
  parallel_items(g.rois, [&](int64_t worker, int64_t roi) {
    call.kernel.backward_points(call.args, roi, call.rows_of_roi(roi),
                                data_of<A>(gradients) + roi * g.bins() * g.output_dim,
                                mutable_data_of<char>(tables) + worker * call.table_bytes(),
                                mutable_data_of<A>(sums) + worker * offsets,
                                grad_offset == nullptr ? nullptr : grad_offset + roi * offsets,
                                grad_mask == nullptr ? nullptr : grad_mask + roi * g.bins());
  });
}

// Each task owns some channels of one image, so that tasks never write to the same place and sums
// are always taken in the same order.
template <typename T, typename C>
void backward_input(const Call<T, C>& call, const Tensor& gradients, const Tensor& grad_input) {
  using A = Accumulation<T>;
  const RoiPoolGeometry& g = call.g;
  if (grad_input.numel() == 0) return;
  const int64_t blocks = divide_up(g.output_dim, kTaskChannels), units = g.images * g.cells();
  // The pixels of a bin are found again by every task: no more of them than threads need.
  const int64_t parts = std::min(blocks, divide_up(torch::stable::get_num_threads(), units));
  const int64_t width = divide_up(blocks, parts) * kTaskChannels;
  const int64_t items = units * parts, workers = worker_count(items);
  const int64_t sums_size = g.pixels() * std::min(width, g.output_dim);
  const Tensor tables = call.tables(workers);
  const Tensor sums = scratch(call.rois, scalar_type_of<A>(), workers * sums_size);
  parallel_items(items, [&](int64_t worker, int64_t item) {
    const int64_t image = item / (g.cells() * parts), channel = item % parts * width;
    const std::vector<int64_t>& rois = call.rois_of_image[image];
    const RoiPoolTask task{item / parts % g.cells(), channel,
                           std::min(width, g.output_dim - channel), rois.data(),
                           static_cast<int64_t>(rois.size())};
    if (task.channels <= 0) return;
    call.kernel.backward_input(call.args, task, data_of<A>(gradients),
                               mutable_data_of<char>(tables) + worker * call.table_bytes(),
                               mutable_data_of<A>(sums) + worker * sums_size,
                               mutable_data_of<T>(grad_input) + image * call.row_size());
  });
}

template <typename T, typename C>
void backward(Call<T, C>& call, const Tensor& grad_output, const RoiPoolGradients& results) {
  using A = Accumulation<T>;
  const RoiPoolGeometry& g = call.g;
  const int64_t size = g.bins() * g.output_dim;
  const Tensor gradients = scratch(call.rois, scalar_type_of<A>(), g.rois * size);
  parallel_items(g.rois, [&](int64_t, int64_t roi) {
    call.kernel.gradient_to_rows(g, data_of<T>(grad_output) + roi * size,
                                 mutable_data_of<A>(gradients) + roi * size);
  });
  if (call.offset.has_value() || call.mask.has_value()) backward_points(call, gradients, results);
  backward_input(call, gradients, results.input);
}

template <typename F>
void dispatch(const RoiPoolInputs& inputs, const F& function) {
  dispatch_dtypes<Half, BFloat16>(
      "input", inputs.input.scalar_type(),
      roi_pool_coordinate_type(inputs.input, inputs.offset, inputs.mask), function);
}

}  // namespace

Tensor roi_pool_forward(const RoiPoolKernels& kernels, const RoiPoolGeometry& g,
                        const RoiPoolInputs& inputs) {
  const Tensor output =
      torch::stable::new_empty(inputs.input, {g.rois, g.output_dim, g.bins_h, g.bins_w});
  dispatch(inputs, [&](auto data, auto coordinates) {
    Call<typename decltype(data)::type, typename decltype(coordinates)::type> call(kernels, g,
                                                                                   inputs);
    forward(call, output);
  });
  return output;
}

RoiPoolGradients roi_pool_backward(const RoiPoolKernels& kernels, const RoiPoolGeometry& g,
                                   const Tensor& grad_output, const RoiPoolInputs& inputs) {
  const auto new_like = [&](const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return torch::stable::new_empty(grad_output, {0});
    return torch::stable::new_empty(*tensor, tensor->sizes());
  };
  const RoiPoolGradients results{new_like(inputs.input), new_like(inputs.offset),
                                 new_like(inputs.mask)};
  dispatch(inputs, [&](auto data, auto coordinates) {
    Call<typename decltype(data)::type, typename decltype(coordinates)::type> call(kernels, g,
                                                                                   inputs);
    backward(call, torch::stable::contiguous(grad_output), results);
  });
  return results;
}

}  // namespace mmdeform
