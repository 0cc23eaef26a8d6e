// Named tensors, as in a state dict, made into the form that kernels want.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "error.hpp"
#include "kernels.hpp"

namespace tinyvit {

// Memory aligned to cache lines (large blocks to large pages), zeroed, with kReadBeyond behind it.
class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes);
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free { void operator()(char* p) const; };
  std::unique_ptr<char, Free> data_;
  size_t bytes_ = 0;
};

// A layer with everything affine beside it folded in: [outputs, inputs...] in double.
struct Folded {
  std::vector<double> weight, bias;
  int outputs = 0, inputs = 0, side = 1;  // inputs without the kernel's side * side
};

class Tensors {
 public:
  Tensors(const tinyvit_tensor* tensors, size_t count);
  bool has(const std::string& name) const { return by_name_.count(name) != 0; }
  // Checks the shape; -1 stands for any size.
  const tinyvit_tensor& get(const std::string& name, const std::vector<long>& shape) const;
  // A convolution with its batch norm: `name`.c and `name`.bn, or `conv` and `norm` by name; one
  // without a norm where those tensors are absent.
  Folded conv(const std::string& name, int outputs, int inputs, int side) const;
  Folded conv(const std::string& conv, const std::string& norm, int outputs, int inputs,
              int side) const;
  // A linear layer, with the affine of the layer norm before it where that is there.
  Folded linear(const std::string& name, const std::string& norm, int outputs, int inputs) const;
  std::vector<float> vector(const std::string& name, int size) const;

 private:
  std::map<std::string, const tinyvit_tensor*> by_name_;
};

// Packs folded layers for one table of kernels and owns the memory.
class Packer {
 public:
  // `has_thirds`: for kernels that multiply thirds of fp32 numbers, where calls give them memory.
  explicit Packer(const Kernels* kernels, bool has_thirds = false)
      : kernels_(kernels), has_thirds_(has_thirds && kernels->linear_scratch) {}
  // Position in memory -> channel, or -1 for padding; empty means the channels themselves.
  typedef std::vector<int> Order;
  Matrix matrix(const Folded& layer, const Order& outputs = {}, const Order& inputs = {});
  Depthwise depthwise(const Folded& layer);
  float* floats(const std::vector<float>& values, int padded);  // the rest is zero
  char* values(const std::vector<double>& values);              // in the maps' precision
  size_t bytes() const { return bytes_; }

 private:
  char* take(size_t bytes);
  void add_thirds(Matrix& m);
  const Kernels* kernels_;
  bool has_thirds_;
  std::vector<Block> blocks_;
  size_t bytes_ = 0, used_ = 0;
};

}  // namespace tinyvit
