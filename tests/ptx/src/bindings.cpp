// The Python module: modules of PTX text, launches on raw addresses. emulator.py wraps it for tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "decode.h"

namespace py = pybind11;

namespace ptx {
namespace {

struct LoadedModule {
  Module module;
  std::map<std::string, std::vector<uint8_t>> storage;  // of .global and .const variables
  std::map<std::string, std::unique_ptr<Program>> programs;

  explicit LoadedModule(const std::string& text) : module(parse(text)) {
    for (const auto& [name, variable] : module.variables)
      if (variable.space == "global" || variable.space == "const") {
        storage[name] = variable.initial;
        storage[name].resize(size_t(variable.size) + 16);
      }
  }

  const Entry& entry(const std::string& name) const {
    const auto found = module.entries.find(name);
    if (found == module.entries.end()) throw Error("launch", "the module has no entry '" + name + "'");
    return found->second;
  }

  uint64_t address(const std::string& name) const {
    return (reinterpret_cast<uint64_t>(storage.at(name).data()) + 15) / 16 * 16;
  }

  const Program& program(const std::string& name) {
    std::unique_ptr<Program>& program = programs[name];
    if (!program) {
      std::map<std::string, uint64_t> globals;
      for (const auto& [variable, bytes] : storage) globals[variable] = address(variable);
      auto decoded = std::make_unique<Program>();
      Decoder(module, entry(name), *decoded, globals).run();
      for (const Instruction& i : decoded->code) decoded->uses_wgmma |= i.is_wgmma;
      program = std::move(decoded);
    }
    return *program;
  }
};

py::dict error_dict(const Error& error) {
  py::dict result;
  result["kind"] = error.kind;
  result["message"] = error.message;
  result["line"] = error.line;
  result["source"] = error.source;
  result["tensor"] = error.tensor;
  return result;
}

py::list instructions(const Launch& launch) {
  py::list rows;
  const Program& program = *launch.program;
  for (size_t k = 0; k < program.code.size(); ++k) {
    const Statement& s = *program.code[k].statement;
    const auto label = program.entry->labels.find(int(k));
    rows.append(py::make_tuple(s.full_name, program.code[k].category, s.line, s.source_line,
                               launch.counters.executed[k], launch.counters.lanes[k], launch.counters.bank_conflicts[k],
                               s.opcode, label == program.entry->labels.end() ? "" : label->second));
  }
  return rows;
}

// regions: (name, address, bytes, address of the state, granule); names: (name, begin, end)
py::dict launch(LoadedModule& loaded, const std::string& entry, std::array<int, 3> grid, std::array<int, 3> block,
                const py::bytes& parameter_bytes, int64_t shared_bytes, uint64_t seed, uint64_t step_limit,
                bool check_lanes, bool serialised_accumulators,
                const std::vector<std::tuple<std::string, uint64_t, uint64_t, uint64_t, int>>& regions,
                const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& names) {
  py::dict result;
  Launch run;
  GlobalMemory global;
  try {
    run.program = &loaded.program(entry);
    run.module = &loaded.module;
    run.global = &global;
    for (int k = 0; k < 3; ++k) {
      run.grid[k] = grid[size_t(k)];
      run.threads[k] = block[size_t(k)];
    }
    run.dynamic_shared = shared_bytes;
    const std::string parameters = parameter_bytes;
    run.parameters.assign(parameters.begin(), parameters.end());
    run.seed = seed;
    run.step_limit = step_limit;
    run.check_lanes = check_lanes;
    run.serialised_accumulators = serialised_accumulators;
    for (const auto& [name, address, bytes, state, granule] : regions)
      global.add(name, address, bytes, reinterpret_cast<uint8_t*>(state), granule);
    for (const auto& [name, begin, end] : names) global.name_range(name, begin, end);
    for (const auto& [name, bytes] : loaded.storage) {
      const uint64_t size = bytes.size() - 16;
      global.add(name, loaded.address(name), size, nullptr, 1);
      global.name_range(name, loaded.address(name), loaded.address(name) + size);
    }
    py::gil_scoped_release release;
    run_launch(run);
  } catch (const Error& error) {
    result["error"] = error_dict(error);
    return result;
  }
  const Counters& c = run.counters;
  result["instructions"] = instructions(run);
  result["global_load_bytes"] = c.global_load_bytes;
  result["global_store_bytes"] = c.global_store_bytes;
  result["global_load_sectors"] = c.global_load_sectors;
  result["global_store_sectors"] = c.global_store_sectors;
  result["shared_wavefronts"] = c.shared_wavefronts;
  result["shared_ideal_wavefronts"] = c.shared_ideal_wavefronts;
  result["tensor_operations"] = c.tensor_operations;
  return result;
}

py::dict describe(const LoadedModule& loaded, const std::string& name) {
  const auto found = loaded.module.entries.find(name);
  if (found == loaded.module.entries.end()) return py::dict();
  const Entry& entry = found->second;
  py::list parameters;
  for (const Variable& p : entry.parameters) parameters.append(py::make_tuple(p.name, p.offset, p.size));
  py::dict result;
  result["parameters"] = parameters;
  result["parameter_bytes"] = entry.parameter_bytes;
  result["required_threads"] =
      py::make_tuple(entry.required_threads[0], entry.required_threads[1], entry.required_threads[2]);
  result["max_threads"] = py::make_tuple(entry.max_threads[0], entry.max_threads[1], entry.max_threads[2]);
  return result;
}

}  // namespace
}  // namespace ptx

PYBIND11_MODULE(ptx_emulator, m) {
  using namespace ptx;
  // The exception carries the dictionary; emulator.py turns it into its own class.
  static py::exception<Error> error_type(m, "Error");
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      PyErr_SetObject(error_type.ptr(), error_dict(error).ptr());
    }
  });
  py::class_<LoadedModule>(m, "Module")
      .def(py::init<const std::string&>())
      .def("entries",
           [](const LoadedModule& self) {
             std::vector<std::string> names;
             for (const auto& [name, entry] : self.module.entries) names.push_back(name);
             return names;
           })
      .def("describe", &describe)
      .def("launch", &launch);
}
