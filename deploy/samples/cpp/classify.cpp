// Classifies JPEG files with a sopdeploy bundle, without Python: ONNX Runtime, libjpeg-turbo and nlohmann/json.
//
//   classify BUNDLE IMAGE...   prints the best class of each image
//   classify BUNDLE --golden   reproduces the golden examples of the bundle; exit code 1 if one differs
//
// EXIF rotation is not applied. README.md beside this file has the compiler command.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>
#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>

using nlohmann::json;

struct Image {  // RGB, rows from top to bottom
  int width, height;
  std::vector<uint8_t> pixels;
};

std::vector<uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

struct JpegError {
  jpeg_error_mgr base;
  std::jmp_buf jump;
};

Image decode(const std::vector<uint8_t>& body) {
  jpeg_decompress_struct jpeg;
  JpegError error;
  jpeg.err = jpeg_std_error(&error.base);
  error.base.error_exit = [](j_common_ptr info) {
    std::longjmp(reinterpret_cast<JpegError*>(info->err)->jump, 1);
  };
  Image image;
  if (setjmp(error.jump)) {
    jpeg_destroy_decompress(&jpeg);
    throw std::runtime_error("not a readable JPEG");
  }
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, body.data(), body.size());
  jpeg_read_header(&jpeg, TRUE);
  jpeg.out_color_space = JCS_RGB;  // also of gray files
  jpeg_start_decompress(&jpeg);
  image.width = jpeg.output_width;
  image.height = jpeg.output_height;
  image.pixels.resize(3 * size_t(image.width) * image.height);
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW row = image.pixels.data() + 3 * size_t(image.width) * jpeg.output_scanline;
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  return image;
}

struct Taps {  // the source positions and weights of one target position
  int first;
  std::vector<double> weights;
};

// Pillow's resampling: the filter is wider the more the image is reduced.
std::vector<Taps> taps(int from, int to, const std::string& interpolation) {
  const bool cubic = interpolation == "bicubic";
  const double scale = double(from) / to, stretch = std::max(1.0, scale);
  const double reach = (cubic ? 2.0 : 1.0) * stretch;
  std::function<double(double)> filter = [](double x) { return std::max(0.0, 1.0 - std::abs(x)); };
  if (cubic) {
    filter = [](double x) {
      x = std::abs(x);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0.0;
    };
  }
  std::vector<Taps> found;
  for (int target = 0; target < to; target++) {
    const double center = (target + 0.5) * scale;
    const int first = std::max(0, int(center - reach + 0.5));
    const int end = std::min(from, int(center + reach + 0.5));
    Taps one{first, {}};
    double sum = 0;
    for (int source = first; source < end; source++) {
      one.weights.push_back(filter((source - center + 0.5) / stretch));
      sum += one.weights.back();
    }
    for (double& weight : one.weights) weight /= sum;
    found.push_back(one);
  }
  return found;
}

uint8_t rounded(double value) { return uint8_t(std::clamp(std::floor(value + 0.5), 0.0, 255.0)); }

// One pass: the columns or, with `down`, the rows of the image resampled at `positions`, rounded to 8 bits.
Image resample(const Image& image, const std::vector<Taps>& positions, bool down) {
  const int width = down ? image.width : int(positions.size());
  const int height = down ? int(positions.size()) : image.height;
  const size_t along = down ? 3 * size_t(image.width) : 3, across = down ? 3 : 3 * size_t(image.width);
  Image result{width, height, {}};
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++) {
      const Taps& taps = positions[down ? y : x];
      for (int channel = 0; channel < 3; channel++) {
        const size_t start = taps.first * along + (down ? x : y) * across + channel;
        double sum = 0;
        for (size_t i = 0; i < taps.weights.size(); i++) sum += taps.weights[i] * image.pixels[start + i * along];
        result.pixels.push_back(rounded(sum));
      }
    }
  return result;
}

Image resize(const Image& image, int width, int height, const std::string& interpolation) {
  const auto columns = taps(image.width, width, interpolation), rows = taps(image.height, height, interpolation);
  // Pillow 13 starts with the rows if that removes more; earlier versions start with the columns.
  const int removed = image.height - height;
  if (removed > 0 && removed > 2 * (image.width - width))
    return resample(resample(image, rows, true), columns, false);
  return resample(resample(image, columns, false), rows, true);
}

// The network's input (crop, crop, 3) by the rules `preprocess` of the manifest.
std::vector<uint8_t> preprocess(const Image& image, const json& rules) {
  if (rules.value("decoding", "full") != "full")
    throw std::runtime_error("this program decodes all pixels of a JPEG; train with preprocess.decoding=full");
  if (!rules.value("antialias", true))
    throw std::runtime_error("this program resizes with antialiasing, as Pillow does");
  const int crop = rules["crop"];
  const std::string fit = rules.value("fit", "crop");
  const int shorter = std::min(image.width, image.height), longer = std::max(image.width, image.height);
  int small = crop, large = crop;
  if (fit == "crop") {
    small = rules["resize"];
    large = std::max(1, int(double(small) * longer / shorter));
  } else if (fit == "squash-crop") {
    small = large = rules["resize"];
  } else if (fit == "pad") {
    small = std::max(1, int(std::nearbyint(double(crop) * shorter / longer)));
  }
  const bool tall = image.width <= image.height;
  const Image resized =
      resize(image, tall ? small : large, tall ? large : small, rules["interpolation"].get<std::string>());
  const int left = int(std::nearbyint((resized.width - crop) / 2.0));
  const int top = int(std::nearbyint((resized.height - crop) / 2.0));
  std::vector<uint8_t> input;
  for (int y = top; y < top + crop; y++)
    for (int x = left; x < left + crop; x++)
      for (int channel = 0; channel < 3; channel++) {
        const bool inside = x >= 0 && x < resized.width && y >= 0 && y < resized.height;
        input.push_back(inside ? resized.pixels[3 * (size_t(y) * resized.width + x) + channel]
                               : rules["background"][channel].get<uint8_t>());
      }
  return input;
}

Ort::SessionOptions session_options() {
  Ort::SessionOptions options;  // int8 is exact on x86 processors without VNNI, too
  options.AddConfigEntry("session.x64quantprecision", "1");
  return options;
}

struct Network {
  Ort::Env env{ORT_LOGGING_LEVEL_ERROR};
  Ort::Session session;
  int64_t side;
  std::string input, output;

  Network(const std::string& bundle, const json& manifest)
      : session(env, (bundle + "/model.onnx").c_str(), session_options()),
        side(manifest["preprocess"]["crop"]),
        input(manifest["inputs"][0]["name"]),
        output(manifest["outputs"][0]["name"]) {}

  std::vector<float> logits(std::vector<uint8_t> pixels) {
    const int64_t shape[] = {1, side, side, 3};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape, 4);
    const char *inputs[] = {input.c_str()}, *outputs[] = {output.c_str()};
    auto values = session.Run(Ort::RunOptions(), inputs, &tensor, 1, outputs, 1);
    const float* first = values[0].GetTensorData<float>();
    return {first, first + values[0].GetTensorTypeAndShapeInfo().GetElementCount()};
  }
};

size_t best(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// Compare decoded pixels, logits of the stored pixels and the class of the decoded ones.
bool reproduces(const std::string& bundle, const json& rules, const json& example, double tolerance,
                Network& network) {
  const std::string name = example["jpeg"];
  const auto found = preprocess(decode(read_file(bundle + "/" + name)), rules);
  const auto stored = read_file(bundle + "/" + example["pixels"].get<std::string>());
  if (found.size() != stored.size()) throw std::runtime_error(name + ": stored pixels of another size");
  int levels = 0;
  for (size_t i = 0; i < found.size(); i++) levels = std::max(levels, std::abs(found[i] - stored[i]));
  const auto expected = example["logits"].get<std::vector<float>>();
  const auto logits = network.logits(stored);
  double difference = 0;
  for (size_t i = 0; i < logits.size(); i++) {
    const float finite = std::max(logits[i], std::numeric_limits<float>::lowest());  // masked: -infinity
    difference = std::max(difference, double(std::abs(finite - expected[i])));
  }
  const bool same = best(network.logits(found)) == best(expected);
  std::cout << name << ": pixels within " << levels << ", logits within " << difference << " of "
            << tolerance << ", " << (same ? "same class" : "another class") << "\n";
  return levels <= 1 && difference <= tolerance && same;
}

int main(int count, char** words) try {
  if (count < 3) {
    std::cerr << "usage: classify BUNDLE IMAGE... or classify BUNDLE --golden\n";
    return 2;
  }
  const std::string bundle = words[1];
  const json manifest = json::parse(read_file(bundle + "/manifest.json"));
  const json labels = json::parse(read_file(bundle + "/labels.json"));
  Network network(bundle, manifest);
  if (std::string(words[2]) == "--golden") {
    const json golden = json::parse(read_file(bundle + "/golden.json"));
    bool all = true;
    for (const json& example : golden["examples"])
      all = reproduces(bundle, manifest["preprocess"], example, golden["tolerance"], network) && all;
    return all ? 0 : 1;
  }
  for (int number = 2; number < count; number++) {
    const Image image = decode(read_file(words[number]));
    const auto logits = network.logits(preprocess(image, manifest["preprocess"]));
    std::cout << words[number] << ": " << labels[best(logits)].get<std::string>() << "\n";
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 2;
}
