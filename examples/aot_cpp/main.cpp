// Runs a model compiled by export.py on prepared images: float32, batch x 3 x height x width.
//
//   ./classify vit.pt2 images.bin 224

#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: classify MODEL IMAGES SIDE\n";
    return 2;
  }
  const int64_t side = std::atoll(argv[3]);
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const int64_t image_bytes = 3 * side * side * static_cast<int64_t>(sizeof(float));
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (side < 1 || size == 0 || size % image_bytes != 0) {
    std::cerr << argv[2] << ": expected images of " << image_bytes << " bytes each, got " << size << " bytes\n";
    return 2;
  }
  const torch::Tensor images = torch::from_blob(bytes.data(), {size / image_bytes, 3, side, side}, torch::kFloat32);

  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const torch::Tensor logits = model.run({images}).at(0);  // batch x classes
  const auto [best, which] = logits.max(1);
  std::cout << std::fixed << std::setprecision(4);
  for (int64_t image = 0; image < logits.size(0); ++image) {
    std::cout << "image " << image << ": class " << which[image].item<int64_t>() << ", logit "
              << best[image].item<float>() << "\n";
  }
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
