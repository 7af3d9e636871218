// rfkernels._C: what was built, and the C++ geometry and plan for the tests that compare them with their Python twins.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../geometry.h"
#include "../plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, slot arithmetic and the plan of the compiled part of rfkernels.";
  m.attr("torch_version") = RF_TORCH_VERSION;  // built against; runs on every torch from torch_target on
  m.attr("torch_target") = RF_TORCH_TARGET;
  m.attr("compiler") = RF_COMPILER;
  m.attr("cuda") = RF_CUDA_VERSION;                      // "" for a CPU-only build
  m.attr("cuda_architectures") = RF_CUDA_ARCHITECTURES;  // "8.0, 9.0+PTX"
  m.attr("cuda_head_dims") = RF_CUDA_HEAD_DIMS;          // of the attention kernels, "64, 128"
  m.attr("cuda_reason") = RF_CUDA_REASON;                // why there is no CUDA code, "" where there is

  using rfkernels::CacheGeometry;
  py::class_<CacheGeometry>(m, "CacheGeometry")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("sink_frames"), py::arg("window_frames"),
           py::arg("frame_tokens"))
      .def("evicted_frames", &CacheGeometry::evicted_frames)
      .def("valid_frames", &CacheGeometry::valid_frames)
      .def("slot", &CacheGeometry::slot)
      .def("fuse_slot", &CacheGeometry::fuse_slot)
      .def("sink_position", &CacheGeometry::sink_position);

  using rfkernels::WindowMask;
  py::class_<WindowMask>(m, "WindowMask")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, bool>(), py::arg("sink_tokens"), py::arg("window_tokens"),
           py::arg("chunk_tokens"), py::arg("first_chunk_tokens"), py::arg("own_chunk"))
      .def("chunk_begin", &WindowMask::chunk_begin)
      .def("chunk_end", &WindowMask::chunk_end)
      .def("visible", &WindowMask::visible);

  m.def("key_shares", &rfkernels::key_shares, py::arg("row_tiles"), py::arg("keys"), py::arg("tile_keys"),
        py::arg("processors"), py::arg("per_processor"));
}
