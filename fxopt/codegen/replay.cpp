// A captured run is replayed in one call: is everything where it was, copies in, launch, copies out.
//
// runtime/recording.py does the same in Python, and says what the parts are; whatever is not as expected here is left to it:
// a call then returns None and has done nothing. The device's functions come as addresses, with the signatures of the CUDA
// driver's.
//
// Of torch's headers only c10's are read: those of its Python bindings take a compiler 18 s and a gigabyte. What they would
// tell is where a Python tensor holds its TensorImpl, and `is_layout_known` asks torch itself.
//
// While the interpreter's lock is released, only driver functions run: nobody who waits for the device, or for another
// thread, keeps that lock. The turn's lock (runtime/cuda_graph.py, Turns) is held meanwhile.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include <c10/core/TensorImpl.h>

namespace {

using Sizes = std::vector<int64_t>;
using CopyFn = int (*)(unsigned long long target, unsigned long long source, size_t bytes, void* stream);
using LaunchFn = int (*)(void* executable, void* stream);
using RecordFn = int (*)(void* event, void* stream);
using WaitFn = int (*)(void* stream, void* event, unsigned flags);
using CapturingFn = int (*)(void* stream, int* status);
using KernelFn = int (*)(
    void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
    unsigned shared, void* stream, void** parameters, void** extra);
using TellFn = int (*)(void* executable, void* node, const void* parameters);

// The parameter of the kernel in runtime/copies.cu.
struct Copy {
  uint64_t target, source, bytes;
};

constexpr size_t kMostCopies = 32;

struct Copies {
  Copy all[kMostCopies];
};

// What a node copies in the next replay (runtime/copies.py, Told), which Python may change, too.
struct Told {
  Copies copies;
  uint64_t is_known;
};

// The kernel as a node of the captured run, with `count` copies.
struct Node {
  size_t count;
  Told* told;
  void* handle;
  const void* parameters;  // the driver's, with the address of what is told
};

constexpr uintptr_t kPerThreadStream = 2;  // the handle of a default stream that each thread has of its own

constexpr unsigned kThreads = 256;
constexpr uint64_t kMostBlocks = 1024;  // of one copy; a thread copies 16 bytes at a time

// A reference that is held as long as this lives.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(other.take()) {}
  Ref& operator=(Ref&& other) noexcept {
    PyObject* old = object_;
    object_ = other.take();
    Py_XDECREF(old);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  static Ref to(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Ref(borrowed);
  }
  PyObject* get() const { return object_; }
  PyObject* take() {
    PyObject* out = object_;
    object_ = nullptr;
    return out;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// An input that is used where it is.
struct Fixed {
  Py_ssize_t at;
  uint64_t address;
};

// An input that is copied before each replay.
struct Moved {
  Py_ssize_t at;
  Sizes shape, strides;
  uint64_t bytes, target;
};

// An input that tells the sizes of a call: a tensor, or a number.
struct Varying {
  Py_ssize_t at;
  bool is_number;
  int64_t number;
  Sizes shape, strides;
};

// A result with memory of its own.
struct Fresh {
  Py_ssize_t at;
  Ref shape, strides, dtype;
  uint64_t bytes, source;
};

// A result that is an input.
struct Given {
  Py_ssize_t at, input;
};

struct Body {
  Py_ssize_t count = 0, results = 0;
  std::vector<Fixed> fixed;
  std::vector<Moved> moved;
  std::vector<Varying> varying;
  std::vector<uint64_t> seeds;
  Ref constants;
  std::vector<Fresh> fresh;
  std::vector<Given> given;
  std::vector<Py_ssize_t> written;
  c10::Device device = c10::Device(c10::DeviceType::CPU);
  int index = 0;
  Ref index_object;
  Ref turns, acquire, release, driver;
  CopyFn copy = nullptr;
  LaunchFn launch = nullptr;
  RecordFn record = nullptr;
  WaitFn wait = nullptr;
  CapturingFn capturing = nullptr;
  KernelFn launch_kernel = nullptr;
  TellFn tell = nullptr;
  bool has_nodes = false;  // which do the copies; else these are enqueued around the captured run
  std::vector<Node> before, after;
  void* copies = nullptr;  // the kernel that does several copies; null where there is none
  void *executable = nullptr, *event = nullptr;
  Ref graph, nodes;  // their owners
  Ref is_watched, current_device, stream_of, draw, empty, fail;
};

struct Replay {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  Body* body;
};

PyObject *tensor_type, *parameter_type, *owner_name, *last_name, *in_line_name, *zero;

// ------------------------------------------------------------------ looking at a call

// A tensor as Python sees it, up to where its TensorImpl is.
struct PythonTensor {
  PyObject_HEAD
  c10::TensorImpl* impl;
};

c10::TensorImpl* impl_of(PyObject* tensor) { return reinterpret_cast<PythonTensor*>(tensor)->impl; }

// Subclasses are left to Python: what their memory means is theirs to say.
c10::TensorImpl* look(PyObject* x) {
  const PyObject* type = reinterpret_cast<const PyObject*>(Py_TYPE(x));
  return type == tensor_type || type == parameter_type ? impl_of(x) : nullptr;
}

uint64_t address(c10::TensorImpl* x) { return reinterpret_cast<uint64_t>(x->mutable_data()); }

bool has_layout(const c10::TensorImpl* x, const Sizes& shape, const Sizes& strides) {
  return x->sizes().equals(shape) && x->strides().equals(strides);
}

bool has_fixed(const Body* self, PyObject* const* inputs) {
  for (const Fixed& one : self->fixed) {
    c10::TensorImpl* x = look(inputs[one.at]);
    if (x == nullptr || address(x) != one.address) return false;
  }
  return true;
}

// Whether what is copied has the layout that it had; the copies.
bool add_moves(const Body* self, PyObject* const* inputs, std::vector<Copy>* copies) {
  for (const Moved& one : self->moved) {
    c10::TensorImpl* x = look(inputs[one.at]);
    if (x == nullptr || !has_layout(x, one.shape, one.strides) || x->device() != self->device) return false;
    copies->push_back({one.target, address(x), one.bytes});
  }
  return true;
}

// Whether the captured run is one for these inputs; the copies of those that it has to be given.
bool fits(const Body* self, PyObject* const* inputs, std::vector<Copy>* copies) {
  for (const Varying& one : self->varying) {
    PyObject* input = inputs[one.at];
    if (one.is_number) {
      if (!PyLong_CheckExact(input)) return false;
      int overflow = 0;
      if (PyLong_AsLongLongAndOverflow(input, &overflow) != one.number || overflow) return false;
    } else {
      const c10::TensorImpl* x = look(input);
      if (x == nullptr || !has_layout(x, one.shape, one.strides)) return false;
    }
  }
  return has_fixed(self, inputs) && add_moves(self, inputs, copies);
}

bool equals(PyObject* call_result, int64_t wanted) {
  Ref owned(call_result);
  if (!owned) {
    PyErr_Clear();
    return false;
  }
  const int64_t found = PyLong_AsLongLong(owned.get());
  if (found == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return found == wanted;
}

// Whether this thread's calls take effect at once, unseen, on the device; its stream.
bool is_free(const Body* self, void** stream) {
  if (self->is_watched.get() != Py_None && !equals(PyObject_CallNoArgs(self->is_watched.get()), 0)) return false;
  if (!equals(PyObject_CallNoArgs(self->current_device.get()), self->index)) return false;
  Ref handle(PyObject_CallOneArg(self->stream_of.get(), self->index_object.get()));
  if (!handle) {
    PyErr_Clear();
    return false;
  }
  *stream = PyLong_AsVoidPtr(handle.get());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  int status = 0;
  return self->capturing(*stream, &status) == 0 && status == 0;
}

// ------------------------------------------------------------------ a turn

// Turns.take, for who finds nobody inside.
class Turn {
 public:
  explicit Turn(const Body* self) : self_(self) {
    Ref got(PyObject_CallOneArg(self->acquire.get(), Py_False));
    if (got.get() != Py_True) return;
    Ref owner(PyObject_GetAttr(self->turns.get(), owner_name));
    Ref me(PyLong_FromUnsignedLong(PyThread_get_thread_ident()));
    if (owner && me && PyObject_RichCompareBool(owner.get(), zero, Py_EQ) == 1)
      taken_ = PyObject_SetAttr(self->turns.get(), owner_name, me.get()) == 0;
    if (!taken_) leave();
  }
  ~Turn() {
    if (taken_) leave();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  bool taken() const { return taken_; }

  // Whether the last turn is known to have been on this stream; -1 with an exception.
  int is_last(void* stream) const {
    Ref last(PyObject_GetAttr(self_->turns.get(), last_name));
    if (!last) return -1;
    if (last.get() == Py_None) return 0;
    void* found = PyLong_AsVoidPtr(last.get());
    if (found == nullptr && PyErr_Occurred()) return -1;
    return found == stream && reinterpret_cast<uintptr_t>(stream) != kPerThreadStream;
  }

  // Whether ends of turns are not recorded, since all are on the default stream; -1 with an exception.
  int is_in_line() const {
    Ref found(PyObject_GetAttr(self_->driver.get(), in_line_name));
    return found ? found.get() == Py_True : -1;
  }

  int set_last(void* stream) const {
    Ref number(PyLong_FromUnsignedLongLong(reinterpret_cast<uint64_t>(stream)));
    return number ? PyObject_SetAttr(self_->turns.get(), last_name, number.get()) : -1;
  }

 private:
  void leave() const {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (taken_ && PyObject_SetAttr(self_->turns.get(), owner_name, zero) != 0) PyErr_Clear();
    Ref ignored(PyObject_CallNoArgs(self_->release.get()));
    if (!ignored) PyErr_Clear();
    PyErr_Restore(type, value, trace);
  }

  const Body* self_;
  bool taken_ = false;
};

// ------------------------------------------------------------------ the replay

struct Failure {
  const char* what = nullptr;
  int code = 0;
};

// The copies, all at once where there is a kernel for that. The driver's result.
int enqueue_copies(const Body* self, const std::vector<Copy>& copies, void* stream) {
  if (self->copies == nullptr || copies.size() < 2) {
    for (const Copy& one : copies)
      if (const int code = self->copy(one.target, one.source, one.bytes, stream)) return code;
    return 0;
  }
  for (size_t first = 0; first < copies.size(); first += kMostCopies) {
    const size_t count = std::min(copies.size() - first, kMostCopies);
    Copies all{};
    uint64_t largest = 1;
    for (size_t k = 0; k < count; ++k) {
      all.all[k] = copies[first + k];
      largest = std::max(largest, all.all[k].bytes);
    }
    const uint64_t blocks = std::min((largest + 16 * kThreads - 1) / (16 * kThreads), kMostBlocks);
    void* parameters[] = {&all};
    if (const int code = self->launch_kernel(
            self->copies, static_cast<unsigned>(blocks), static_cast<unsigned>(count), 1, kThreads, 1, 1, 0, stream, parameters,
            nullptr))
      return code;
  }
  return 0;
}

// Lets the next replay do these copies by its nodes, which have room for just as many. The driver's result.
int tell_nodes(const Body* self, const std::vector<Node>& nodes, const std::vector<Copy>& copies) {
  const Copy* next = copies.data();
  for (const Node& node : nodes) {
    const size_t bytes = node.count * sizeof(Copy);
    Told* told = node.told;
    if (!told->is_known || std::memcmp(told->copies.all, next, bytes) != 0) {
      told->is_known = 0;
      std::memcpy(told->copies.all, next, bytes);
      if (const int code = self->tell(self->executable, node.handle, node.parameters)) return code;
      told->is_known = 1;
    }
    next += node.count;
  }
  return 0;
}

// What a turn consists of, in the stream's order.
Failure enqueue(const Body* self, void* stream, const std::vector<Copy>& before, const std::vector<Copy>& after) {
  const char* copying = "copying for a CUDA graph";
  if (self->has_nodes) {
    if (const int code = tell_nodes(self, self->before, before)) return {copying, code};
    if (const int code = tell_nodes(self, self->after, after)) return {copying, code};
    return {"replaying a CUDA graph", self->launch(self->executable, stream)};
  }
  if (const int code = enqueue_copies(self, before, stream)) return {copying, code};
  if (const int code = self->launch(self->executable, stream)) return {"replaying a CUDA graph", code};
  return {copying, enqueue_copies(self, after, stream)};
}

// A whole turn. What goes wrong does not keep its end from being recorded.
Failure take_turn(
    const Body* self, void* stream, bool in_line, bool same_stream, const std::vector<Copy>& before,
    const std::vector<Copy>& after) {
  if (in_line) return enqueue(self, stream, before, after);
  Failure failure;
  if (!same_stream) failure = {"waiting for an event", self->wait(stream, self->event, 0)};
  if (failure.code == 0) failure = enqueue(self, stream, before, after);
  const int recorded = self->record(self->event, stream);
  return failure.code == 0 ? Failure{"recording an event", recorded} : failure;
}

// What a replay needs beside its inputs: results and seeds, made before anything is enqueued.
struct Prepared {
  Ref results, drawn;  // the seeds are alive until they are copied
  std::vector<Copy> before, after;
};

// `made.before` has the copies of inputs. False with an exception.
bool prepare(const Body* self, PyObject* const* inputs, Prepared* made) {
  made->results = Ref(PyTuple_New(self->results));
  if (!made->results) return false;
  PyObject* out = made->results.get();
  for (Py_ssize_t k = 0; k < self->results; ++k) {
    PyObject* constant = PyTuple_GET_ITEM(self->constants.get(), k);
    Py_INCREF(constant);
    PyTuple_SET_ITEM(out, k, constant);
  }
  auto set = [out](Py_ssize_t at, PyObject* value) {
    Py_DECREF(PyTuple_GET_ITEM(out, at));
    PyTuple_SET_ITEM(out, at, value);
  };
  for (const Given& one : self->given) {
    Py_INCREF(inputs[one.input]);
    set(one.at, inputs[one.input]);
  }
  if (!self->seeds.empty()) {
    made->drawn = Ref(PyList_New(0));
    if (!made->drawn) return false;
  }
  for (const uint64_t target : self->seeds) {
    Ref one(PyObject_CallNoArgs(self->draw.get()));
    if (!one || PyList_Append(made->drawn.get(), one.get()) != 0) return false;
    made->before.push_back({target, address(impl_of(one.get())), sizeof(int64_t)});
  }
  for (const Fresh& one : self->fresh) {
    PyObject* arguments[] = {one.shape.get(), one.strides.get(), one.dtype.get()};
    PyObject* fresh = PyObject_Vectorcall(self->empty.get(), arguments, 3, nullptr);
    if (fresh == nullptr) return false;
    set(one.at, fresh);
    if (one.bytes) made->after.push_back({address(impl_of(fresh)), one.source, one.bytes});
  }
  return true;
}

// The results when all has been enqueued.
PyObject* finish(const Body* self, PyObject* const* inputs, const Failure& failure, Prepared* made) {
  if (failure.code != 0) {
    Ref ignored(PyObject_CallFunction(self->fail.get(), "si", failure.what, failure.code));
    if (ignored) PyErr_SetString(PyExc_SystemError, failure.what);
    return nullptr;
  }
  for (const Py_ssize_t at : self->written) {
    c10::TensorImpl* changed = look(inputs[at]);  // as what was captured did; inference tensors do not count
    if (changed != nullptr && !changed->is_inference()) changed->bump_version();
  }
  return made->results.take();
}

PyObject* run(const Body* self, PyObject* const* inputs, void* stream, Prepared* made) {
  Failure failure;
  {
    Turn turn(self);
    if (!turn.taken()) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
    const int same = turn.is_last(stream), in_line = turn.is_in_line();
    if (same < 0 || in_line < 0) return nullptr;
    if (in_line && !same) Py_RETURN_NONE;  // somebody has to wait for a turn whose end was not recorded
    if (!prepare(self, inputs, made)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    failure = take_turn(self, stream, in_line != 0, same != 0, made->before, made->after);
    Py_END_ALLOW_THREADS
    if (!same && turn.set_last(stream) != 0) return nullptr;
  }
  return finish(self, inputs, failure, made);
}

bool unpack(const Body* self, PyObject* args, PyObject* const** inputs) {
  if (!PyList_CheckExact(args) && !PyTuple_CheckExact(args)) {
    PyErr_SetString(PyExc_TypeError, "inputs come in a list or a tuple");
    return false;
  }
  *inputs = PySequence_Fast_GET_SIZE(args) == self->count ? PySequence_Fast_ITEMS(args) : nullptr;
  return true;
}

const Body* body_of(PyObject* object) { return reinterpret_cast<Replay*>(object)->body; }

PyObject* play(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  if (PyVectorcall_NARGS(flags) != 1 || names != nullptr) {
    PyErr_SetString(PyExc_TypeError, "it takes one list or tuple");
    return nullptr;
  }
  const Body* self = body_of(object);
  PyObject* const* inputs = nullptr;
  if (!unpack(self, args[0], &inputs)) return nullptr;
  try {
    Prepared made;
    made.before.reserve(self->moved.size() + self->seeds.size());
    void* stream = nullptr;
    if (inputs == nullptr || !fits(self, inputs, &made.before) || !is_free(self, &stream)) Py_RETURN_NONE;
    return run(self, inputs, stream, &made);
  } catch (const std::exception&) {  // of a tensor without memory: nothing has been enqueued
    Py_RETURN_NONE;
  }
}

// A replay within a turn that the caller holds, on the turn's stream, for inputs that the captured run is known to be one for.
PyObject* play_within(PyObject* object, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "it takes inputs and a stream");
    return nullptr;
  }
  const Body* self = body_of(object);
  PyObject* const* inputs = nullptr;
  if (!unpack(self, args[0], &inputs)) return nullptr;
  void* stream = PyLong_AsVoidPtr(args[1]);
  if (PyErr_Occurred()) return nullptr;
  try {
    Prepared made;
    if (inputs == nullptr || !add_moves(self, inputs, &made.before)) Py_RETURN_NONE;
    if (!prepare(self, inputs, &made)) return nullptr;
    Failure failure;
    Py_BEGIN_ALLOW_THREADS
    failure = enqueue(self, stream, made.before, made.after);
    Py_END_ALLOW_THREADS
    return finish(self, inputs, failure, &made);
  } catch (const std::exception&) {  // of a tensor without memory: nothing has been enqueued
    Py_RETURN_NONE;
  }
}

PyObject* compare(PyObject* object, PyObject* args) {
  const Body* self = body_of(object);
  PyObject* const* inputs = nullptr;
  if (!unpack(self, args, &inputs)) return nullptr;
  try {
    return PyBool_FromLong(inputs != nullptr && has_fixed(self, inputs));
  } catch (const std::exception&) {
    Py_RETURN_FALSE;
  }
}

// ------------------------------------------------------------------ making one

bool read_sizes(PyObject* numbers, Sizes* out) {
  Ref items(PySequence_Fast(numbers, "sizes are a sequence"));
  if (!items) return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(items.get()); ++k)
    out->push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.get(), k)));
  return !PyErr_Occurred();
}

// Whether `each` could read every item of a tuple.
template <typename Each>
bool read_all(PyObject* items, Each each) {
  if (!PyTuple_Check(items)) {
    PyErr_SetString(PyExc_TypeError, "parts come in tuples");
    return false;
  }
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(items); ++k)
    if (!each(PyTuple_GET_ITEM(items, k))) return false;
  return true;
}

bool check_position(Py_ssize_t at, Py_ssize_t count) {
  if (at >= 0 && at < count) return true;
  PyErr_SetString(PyExc_IndexError, "there is no such input or result");
  return false;
}

bool read_layout(PyObject* shape, PyObject* strides, Sizes* shape_out, Sizes* strides_out) {
  if (!read_sizes(shape, shape_out) || !read_sizes(strides, strides_out)) return false;
  if (shape_out->size() == strides_out->size()) return true;
  PyErr_SetString(PyExc_ValueError, "there is a stride for each size");
  return false;
}

bool read_inputs(Body* self, PyObject* fixed, PyObject* moved, PyObject* varying) {
  return read_all(fixed, [self](PyObject* item) {
    Fixed one{};
    unsigned long long address = 0;
    if (!PyArg_ParseTuple(item, "nK", &one.at, &address) || !check_position(one.at, self->count)) return false;
    one.address = address;
    self->fixed.push_back(one);
    return true;
  }) && read_all(moved, [self](PyObject* item) {
    Moved one{};
    PyObject *shape, *strides;
    unsigned long long bytes = 0, target = 0;
    if (!PyArg_ParseTuple(item, "nOOKK", &one.at, &shape, &strides, &bytes, &target)) return false;
    if (!check_position(one.at, self->count) || !read_layout(shape, strides, &one.shape, &one.strides)) return false;
    one.bytes = bytes;
    one.target = target;
    self->moved.push_back(std::move(one));
    return true;
  }) && read_all(varying, [self](PyObject* item) {
    Varying one{};
    PyObject *what, *shape, *strides;
    if (!PyArg_ParseTuple(item, "nO", &one.at, &what) || !check_position(one.at, self->count)) return false;
    one.is_number = PyLong_CheckExact(what);
    if (one.is_number) {
      one.number = PyLong_AsLongLong(what);
      if (PyErr_Occurred()) return false;
    } else if (!PyArg_ParseTuple(what, "OO", &shape, &strides) || !read_layout(shape, strides, &one.shape, &one.strides)) {
      return false;
    }
    self->varying.push_back(std::move(one));
    return true;
  });
}

bool read_results(Body* self, PyObject* fresh, PyObject* given, PyObject* written, PyObject* seeds) {
  return read_all(fresh, [self](PyObject* item) {
    Fresh one{};
    PyObject *shape, *strides, *dtype;
    unsigned long long bytes = 0, source = 0;
    if (!PyArg_ParseTuple(item, "nOOOKK", &one.at, &shape, &strides, &dtype, &bytes, &source)) return false;
    if (!check_position(one.at, self->results)) return false;
    one.shape = Ref::to(shape);
    one.strides = Ref::to(strides);
    one.dtype = Ref::to(dtype);
    one.bytes = bytes;
    one.source = source;
    self->fresh.push_back(std::move(one));
    return true;
  }) && read_all(given, [self](PyObject* item) {
    Given one{};
    if (!PyArg_ParseTuple(item, "nn", &one.at, &one.input)) return false;
    self->given.push_back(one);
    return check_position(one.at, self->results) && check_position(one.input, self->count);
  }) && read_all(written, [self](PyObject* item) {
    self->written.push_back(PyLong_AsSsize_t(item));
    return !PyErr_Occurred() && check_position(self->written.back(), self->count);
  }) && read_all(seeds, [self](PyObject* item) {
    self->seeds.push_back(PyLong_AsUnsignedLongLong(item));
    return !PyErr_Occurred();
  });
}

bool read_nodes(PyObject* items, size_t copies, std::vector<Node>* out) {
  size_t count = 0;
  const bool is_read = read_all(items, [&count, out](PyObject* item) {
    unsigned long long told = 0, handle = 0, parameters = 0;
    Node one{};
    if (!PyArg_ParseTuple(item, "KKK", &told, &handle, &parameters)) return false;
    one.told = reinterpret_cast<Told*>(told);
    one.handle = reinterpret_cast<void*>(handle);
    one.parameters = reinterpret_cast<const void*>(parameters);
    out->push_back(one);
    return true;
  });
  if (!is_read) return false;
  for (Node& node : *out) {
    node.count = std::min(copies - count, kMostCopies);
    count += node.count;
  }
  if (count == copies) return true;
  PyErr_SetString(PyExc_ValueError, "nodes do another number of copies");
  return false;
}

// The nodes that do the copies, where they do.
bool read_copies(Body* self, PyObject* nodes, PyObject* before, PyObject* after) {
  self->nodes = Ref::to(nodes);
  self->has_nodes = nodes != Py_None;
  if (!self->has_nodes) return true;
  const auto has_bytes = [](const Fresh& one) { return one.bytes != 0; };
  const size_t results = static_cast<size_t>(std::count_if(self->fresh.begin(), self->fresh.end(), has_bytes));
  return read_nodes(before, self->moved.size() + self->seeds.size(), &self->before) &&
         read_nodes(after, results, &self->after);
}

bool read(Body* self, PyObject* args) {
  PyObject *fixed, *moved, *varying, *constants, *fresh, *given, *written, *seeds, *turns, *lock, *driver, *graph;
  PyObject *nodes, *before, *after;
  PyObject *is_watched, *current_device, *stream_of, *draw, *empty, *fail;
  unsigned long long copy, launch, record, wait, capturing, launch_kernel, tell, copies, executable, event;
  int on_gpu, device_index;
  if (!PyArg_ParseTuple(
          args, "n(OOO)(O!OOO)O(pi)(OOO)(KKKKKKKK)(KKO)(OOO)(OOOOOO)", &self->count, &fixed, &moved, &varying, &PyTuple_Type,
          &constants, &fresh, &given, &written, &seeds, &on_gpu, &device_index, &turns, &lock, &driver, &copy, &launch, &record,
          &wait, &capturing, &launch_kernel, &tell, &copies, &executable, &event, &graph, &nodes, &before, &after, &is_watched,
          &current_device, &stream_of, &draw, &empty, &fail))
    return false;
  self->constants = Ref::to(constants);
  self->results = PyTuple_GET_SIZE(constants);
  self->device = c10::Device(on_gpu ? c10::DeviceType::CUDA : c10::DeviceType::CPU, on_gpu ? device_index : -1);
  self->index = device_index;
  self->index_object = Ref(PyLong_FromLong(device_index));
  self->turns = Ref::to(turns);
  self->driver = Ref::to(driver);
  self->acquire = Ref(PyObject_GetAttrString(lock, "acquire"));
  self->release = Ref(PyObject_GetAttrString(lock, "release"));
  self->copy = reinterpret_cast<CopyFn>(copy);
  self->launch = reinterpret_cast<LaunchFn>(launch);
  self->record = reinterpret_cast<RecordFn>(record);
  self->wait = reinterpret_cast<WaitFn>(wait);
  self->capturing = reinterpret_cast<CapturingFn>(capturing);
  self->launch_kernel = reinterpret_cast<KernelFn>(launch_kernel);
  self->tell = reinterpret_cast<TellFn>(tell);
  self->copies = reinterpret_cast<void*>(copies);
  self->executable = reinterpret_cast<void*>(executable);
  self->event = reinterpret_cast<void*>(event);
  self->graph = Ref::to(graph);
  self->is_watched = Ref::to(is_watched);
  self->current_device = Ref::to(current_device);
  self->stream_of = Ref::to(stream_of);
  self->draw = Ref::to(draw);
  self->empty = Ref::to(empty);
  self->fail = Ref::to(fail);
  if (!self->index_object || !self->acquire || !self->release) return false;
  return read_inputs(self, fixed, moved, varying) && read_results(self, fresh, given, written, seeds) &&
         read_copies(self, nodes, before, after);
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* names) {
  if (names != nullptr && PyDict_GET_SIZE(names) != 0) {
    PyErr_SetString(PyExc_TypeError, "it takes no arguments by name");
    return nullptr;
  }
  Ref object(type->tp_alloc(type, 0));
  if (!object) return nullptr;
  Replay* made = reinterpret_cast<Replay*>(object.get());
  made->vectorcall = play;
  made->body = new Body;
  return read(made->body, args) ? object.take() : nullptr;
}

void unmake(PyObject* object) {
  delete reinterpret_cast<Replay*>(object)->body;
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"play_within", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(play_within)), METH_FASTCALL,
     "Replay within a turn that the caller holds, on its stream."},
    {"has_fixed", compare, METH_O, "Whether the inputs that are used where they are are where they were."},
    {nullptr, nullptr, 0, nullptr}};

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Replay, vectorcall), READONLY, nullptr}, {nullptr, 0, 0, 0, nullptr}};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(unmake)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, nullptr}};

PyType_Spec spec = {
    "fxopt_replay.Replay", sizeof(Replay), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fxopt_replay", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

// Whether tensors hold their TensorImpl where PythonTensor says: `_cdata` is torch's own word for it.
bool is_layout_known(PyObject* torch) {
  for (PyObject* type : {tensor_type, parameter_type}) {
    Ref plain(PyObject_CallMethod(torch, "empty", "i", 3));
    Ref tensor(plain ? PyObject_CallOneArg(type, plain.get()) : nullptr);
    Ref told(tensor ? PyObject_GetAttrString(tensor.get(), "_cdata") : nullptr);
    Ref data(tensor ? PyObject_CallMethod(tensor.get(), "data_ptr", nullptr) : nullptr);
    if (!told || !data) return false;
    const bool roomy = static_cast<size_t>(Py_TYPE(tensor.get())->tp_basicsize) >= sizeof(PythonTensor);
    if (!roomy || PyLong_AsVoidPtr(told.get()) != impl_of(tensor.get()) ||
        PyLong_AsUnsignedLongLong(data.get()) != address(impl_of(tensor.get()))) {
      PyErr_SetString(PyExc_ImportError, "tensors of this torch hold their memory elsewhere");
      return false;
    }
  }
  return true;
}

}  // namespace

PyMODINIT_FUNC PyInit_fxopt_replay() {
  Ref torch(PyImport_ImportModule("torch"));
  if (!torch) return nullptr;
  Ref nn(PyObject_GetAttrString(torch.get(), "nn"));
  if (!nn) return nullptr;
  // Held as long as the process lives, as the module is.
  tensor_type = PyObject_GetAttrString(torch.get(), "Tensor");
  parameter_type = PyObject_GetAttrString(nn.get(), "Parameter");
  owner_name = PyUnicode_InternFromString("owner");
  last_name = PyUnicode_InternFromString("last");
  in_line_name = PyUnicode_InternFromString("in_line");
  zero = PyLong_FromLong(0);
  for (const PyObject* each : {tensor_type, parameter_type, owner_name, last_name, in_line_name, zero})
    if (each == nullptr) return nullptr;
  if (!is_layout_known(torch.get())) return nullptr;
  Ref type(PyType_FromSpec(&spec));
  Ref module(PyModule_Create(&definition));
  if (!type || !module || PyModule_AddObjectRef(module.get(), "Replay", type.get()) != 0) return nullptr;
  return module.take();
}
