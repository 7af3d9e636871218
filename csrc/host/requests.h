// Each operation as one request, and how it is read from an operator's arguments: the order of the fields in C++, once.
// It is that of rfkernels/contract/requests.py, from which the schemas follow.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../geometry.h"

namespace rfkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Takes the arguments of an operator's boxed call one after another, and owns them from then on.
class Reader {
 public:
  // tensors: gets all tensors that are read, if given.
  Reader(StableIValue* stack, uint64_t count, std::vector<Tensor>* tensors = nullptr)
      : stack_(stack), count_(count), tensors_(tensors) {}

  Tensor tensor() {
    Tensor x = next<Tensor>();
    if (tensors_) tensors_->push_back(x);
    return x;
  }
  OptionalTensor optional_tensor() {
    OptionalTensor x = next<OptionalTensor>();
    if (tensors_ && x) tensors_->push_back(*x);
    return x;
  }
  OptionalTensor tensor(bool optional) { return optional ? optional_tensor() : OptionalTensor(tensor()); }
  int64_t integer() { return next<int64_t>(); }
  double number() { return next<double>(); }
  bool flag() { return next<bool>(); }
  ScalarType type() { return next<ScalarType>(); }

  void finish() const {
    STD_TORCH_CHECK(read_ == count_, "the schema has ", count_, " arguments, its request in C++ ", read_);
  }

 private:
  template <class T>
  T next() {
    STD_TORCH_CHECK(read_ < count_, "the schema has ", count_, " arguments, its request in C++ has more");
    return torch::stable::detail::to<T>(stack_[read_++]);
  }

  StableIValue* stack_;
  uint64_t count_, read_ = 0;
  std::vector<Tensor>* tensors_;
};

namespace requests {

inline CacheGeometry read_geometry(Reader& r) { return {r.integer(), r.integer(), r.integer()}; }
inline WindowMask read_mask(Reader& r) { return {r.integer(), r.integer(), r.integer(), r.integer(), r.flag()}; }

struct Rope {
  OptionalTensor frame_turns, spatial;
  bool half_split;
  static Rope read(Reader& r, bool optional = true) { return {r.tensor(optional), r.tensor(optional), r.flag()}; }
};

struct CacheTensors {
  Tensor k, v;
  OptionalTensor sink_k, sink_v;
  static CacheTensors read(Reader& r) { return {r.tensor(), r.tensor(), r.optional_tensor(), r.optional_tensor()}; }
};

struct BeginChunk {
  CacheTensors cache;
  Tensor num_frames;
  int64_t new_frames;
  OptionalTensor advancing, decay;
  Rope rope;
  CacheGeometry geometry;
  bool before_window;
  static BeginChunk read(Reader& r) {
    return {CacheTensors::read(r), r.tensor(),    r.integer(),      r.optional_tensor(),
            r.optional_tensor(),   Rope::read(r), read_geometry(r), r.flag()};
  }
};

struct Write {
  CacheTensors cache;
  Tensor num_frames, new_k, new_v;
  Rope rope;
  CacheGeometry geometry;
  static Write read(Reader& r) {
    return {CacheTensors::read(r), r.tensor(), r.tensor(), r.tensor(), Rope::read(r), read_geometry(r)};
  }
};

struct StreamingAttention {
  Tensor q;
  Write write;
  double scale;
  bool full, return_lse;
  static StreamingAttention read(Reader& r) { return {r.tensor(), Write::read(r), r.number(), r.flag(), r.flag()}; }
};

struct Rotate {
  Tensor x, frames;
  int64_t first_token;
  Rope rope;
  bool inverse;
  ScalarType dtype;
  static Rotate read(Reader& r) {
    return {r.tensor(), r.tensor(), r.integer(), Rope::read(r, false), r.flag(), r.type()};
  }
};

struct ReDMD {
  Tensor x, fake, real_cond;
  OptionalTensor real_uncond, fake_uncond;
  Tensor weight;
  OptionalTensor mask;
  double guidance_scale, fake_guidance_scale;
  bool need_grad;
  static ReDMD read(Reader& r) {
    return {r.tensor(), r.tensor(),          r.tensor(), r.optional_tensor(), r.optional_tensor(),
            r.tensor(), r.optional_tensor(), r.number(), r.number(),          r.flag()};
  }
};

}  // namespace requests

// What a function of one request returns, put where an operator's results belong.
inline void put_results(StableIValue* stack, const Tensor& result) { stack[0] = torch::stable::detail::from(result); }
template <class... T>
void put_results(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... result) { ((*stack++ = torch::stable::detail::from(result)), ...); }, results);
}
template <class T>
constexpr uint64_t kResults = 1;
template <>
inline constexpr uint64_t kResults<void> = 0;
template <class... T>
inline constexpr uint64_t kResults<std::tuple<T...>> = sizeof...(T);

template <class Request>
Request read_request(StableIValue* stack, uint64_t arguments, std::vector<Tensor>* tensors = nullptr) {
  Reader reader(stack, arguments, tensors);
  Request request = Request::read(reader);
  reader.finish();
  return request;
}

template <class Call>
void call_and_put(StableIValue* stack, uint64_t results, const Call& call) {
  using Result = decltype(call());
  STD_TORCH_CHECK(results == kResults<Result>, "the schema has ", results, " results, its kernel ", kResults<Result>);
  if constexpr (std::is_void_v<Result>)
    call();
  else
    put_results(stack, call());
}

template <class Result, class Request>
void call_boxed(Result (*function)(const Request&), StableIValue* stack, uint64_t arguments, uint64_t results) {
  const Request request = read_request<Request>(stack, arguments);
  call_and_put(stack, results, [&] { return function(request); });
}

template <class Result, class Request>
void call_boxed(Result (*function)(const Request&, const std::vector<Tensor>&), StableIValue* stack, uint64_t arguments,
                uint64_t results) {
  std::vector<Tensor> tensors;
  const Request request = read_request<Request>(stack, arguments, &tensors);
  call_and_put(stack, results, [&] { return function(request, tensors); });
}

// A function of one request, or of a request and all tensors in it, as torch calls an operator's kernel.
template <auto kFunction>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  call_boxed(kFunction, stack, arguments, results);
}

}  // namespace rfkernels
