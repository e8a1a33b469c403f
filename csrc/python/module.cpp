// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <sstream>

#include "mixture_of_mamba/models.h"
#include "mixture_of_mamba/nn.h"

// The modules of the C++ frontend in Python, for tests that compare them with Python's own. No part of the
// package: it serves one torch and one Python.

namespace {

namespace py = pybind11;
using namespace mixture_of_mamba;  // NOLINT(google-build-using-namespace): this file is all about it
using torch::Tensor;
using Modality = std::variant<std::monostate, int64_t, Tensor>;
using States = std::vector<std::pair<Tensor, Tensor>>;
using OptionalInteger = std::optional<int64_t>;
using Ranges = std::vector<std::tuple<int64_t, OptionalInteger, OptionalInteger, OptionalInteger>>;
using OptionalState = std::optional<std::pair<Tensor, Tensor>>;

nn::Modality modality_of(const Modality& value) {
  if (const int64_t* one = std::get_if<int64_t>(&value)) return *one;
  if (const Tensor* ids = std::get_if<Tensor>(&value)) return *ids;
  return {};
}

// Options that a layer and a decoder have both; false for another name.
template <typename Options>
bool set_common(Options& options, const std::string& name, const py::handle& value) {
  if (name == "d_state")
    options.d_state(py::cast<int64_t>(value));
  else if (name == "memory")
    options.memory(py::cast<std::string>(value));
  else if (name == "bcdt_norm")
    options.bcdt_norm(py::cast<bool>(value));
  else if (name == "shared_expert")
    options.shared_expert(py::cast<std::vector<std::string>>(value));
  else if (name == "dt_limit")
    options.dt_limit(py::cast<std::pair<double, double>>(value));
  else
    return false;
  return true;
}

std::shared_ptr<nn::MixtureOfMambaImpl> make_layer(int64_t d_model, int64_t num_modalities,
                                                   const std::vector<std::string>& decouple,
                                                   const py::kwargs& more) {
  auto options = nn::MixtureOfMambaOptions(d_model, num_modalities).decouple(decouple);
  for (const auto& [key, value] : more) {
    const auto name = py::cast<std::string>(key);
    if (set_common(options, name, value)) continue;
    if (name == "d_conv")
      options.d_conv(py::cast<int64_t>(value));
    else if (name == "expand")
      options.expand(py::cast<double>(value));
    else if (name == "dt_rank")
      options.dt_rank(py::cast<int64_t>(value));
    else if (name == "dt_init")
      options.dt_init(py::cast<std::string>(value));
    else if (name == "conv_bias")
      options.conv_bias(py::cast<bool>(value));
    else if (name == "bias")
      options.bias(py::cast<bool>(value));
    else if (name == "dt_min")
      options.dt_min(py::cast<double>(value));
    else
      throw py::type_error("unknown option " + name);
  }
  return std::make_shared<nn::MixtureOfMambaImpl>(options);
}

std::shared_ptr<models::ChameleonImpl> make_chameleon(int64_t d_model, int64_t layers, const Ranges& ranges,
                                                      const py::kwargs& more) {
  models::DecoderOptions options(d_model, layers);
  bool tied = false;
  for (const auto& [key, value] : more) {
    const auto name = py::cast<std::string>(key);
    if (set_common(options, name, value)) continue;
    if (name == "num_modalities")
      options.num_modalities(py::cast<int64_t>(value));
    else if (name == "decouple")
      options.decouple(py::cast<std::vector<std::string>>(value));
    else if (name == "mixers_per_layer")
      options.mixers_per_layer(py::cast<int64_t>(value));
    else if (name == "norm_eps")
      options.norm_eps(py::cast<double>(value));
    else if (name == "tied")
      tied = py::cast<bool>(value);
    else
      throw py::type_error("unknown option " + name);
  }
  std::vector<models::TokenRange> all;
  for (const auto& [size, begin, end, length] : ranges) all.push_back({size, begin, end, length});
  return std::make_shared<models::ChameleonImpl>(
      models::ChameleonOptions(options, models::Vocabulary(all)).tied(tied));
}

template <typename Module>
void def_module(py::class_<Module, std::shared_ptr<Module>>& type) {
  type.def("named_parameters", [](Module& self) { return self.named_parameters().pairs(); })
      .def("double", [](Module& self) { self.to(torch::kFloat64); })
      .def("bfloat16", [](Module& self) { self.to(torch::kBFloat16); })
      .def("__repr__", [](const Module& self) {
        std::ostringstream text;
        text << self;
        return text.str();
      });
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(mixture_of_mamba_cpp, m) {
  py::register_exception_translator(&translate);
  m.def("initialize", &initialize);

  py::class_<nn::MixtureOfMambaImpl, std::shared_ptr<nn::MixtureOfMambaImpl>> layer(m, "MixtureOfMamba");
  layer.def(py::init(&make_layer), py::arg("d_model"), py::arg("num_modalities"), py::arg("decouple"))
      .def(
          "forward",
          [](nn::MixtureOfMambaImpl& self, const Tensor& x, const Modality& modality,
             const std::optional<Tensor>& cu_seqlens, const OptionalState& state) {
            nn::MixOptions call{.cu_seqlens = cu_seqlens};
            if (state) call.state = nn::MambaState{state->first, state->second};
            const auto [y, after] = self.forward_with_state(x, modality_of(modality), call);
            return std::make_tuple(y, after.conv, after.ssm);
          },
          py::arg("x"), py::arg("modality") = std::monostate{}, py::kw_only(),
          py::arg("cu_seqlens") = py::none(), py::arg("state") = py::none())
      .def(
          "allocate_state",
          [](const nn::MixtureOfMambaImpl& self, int64_t batch, torch::Dtype ssm_dtype) {
            const nn::MambaState state = self.allocate_state(batch, std::nullopt, ssm_dtype);
            return std::make_tuple(state.conv, state.ssm);
          },
          py::arg("batch"), py::kw_only(), py::arg("ssm_dtype"))
      .def("step", [](nn::MixtureOfMambaImpl& self, const Tensor& x, const Tensor& conv, const Tensor& ssm,
                      const Modality& modality) {
        nn::MambaState state{conv, ssm};
        return self.step(x, state, modality_of(modality));
      });
  def_module(layer);

  py::class_<models::ChameleonImpl, std::shared_ptr<models::ChameleonImpl>> chameleon(m, "Chameleon");
  chameleon.def(py::init(&make_chameleon), py::arg("d_model"), py::arg("layers"), py::arg("ranges"))
      .def(
          "forward",
          [](models::ChameleonImpl& self, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens,
             const States& states) {
            models::DecoderCall call{.cu_seqlens = cu_seqlens};
            if (!states.empty()) call.state = models::DecoderState{};
            for (const auto& [conv, ssm] : states) call.state->mamba.push_back({conv, ssm});
            const auto [logits, after] = self.forward_with_state(tokens, {}, call);
            States pairs;
            for (const nn::MambaState& one : after.mamba) pairs.emplace_back(one.conv, one.ssm);
            return std::make_tuple(logits, pairs);
          },
          py::arg("tokens"), py::kw_only(), py::arg("cu_seqlens") = py::none(), py::arg("states") = States())
      .def(
          "loss",
          [](models::ChameleonImpl& self, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens) {
            const auto losses = self.loss(tokens, {}, cu_seqlens);
            return std::make_tuple(losses.cross_entropy, losses.z, losses.count, losses.total(),
                                   losses.means());
          },
          py::arg("tokens"), py::kw_only(), py::arg("cu_seqlens") = py::none());
  def_module(chameleon);
}
