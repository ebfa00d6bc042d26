// What a call looks at of modules, remembered: as long as nothing of it has changed, Dynamo's guards need not be evaluated again.
//
// capture/memory.py says what a path leads through: steps from a frame's locals or its globals to each value that a guard is
// about. A record of the walk along all of them is a row of facts: words in objects (their type, the slot of their dict, the
// version of a dict or of a type), items of dicts, and what tensors are like. They are as strict as all the guards on the way, or
// stricter. When each fact holds, every value is the one that passed; when one does not, the guards decide, as ever.
//
// Facts come in the order of the walk, and checking ends at the first that does not hold. So an object is read only when what
// leads to it is known to hold it still: nothing is kept alive for its sake. Versions are never given twice. What is compared by
// its address alone might be another object at an address used again: such a value is kept, when it is small and can not change,
// or is looked at itself.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <set>
#include <utility>
#include <vector>

#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#if PY_VERSION_HEX < 0x030B0000 || PY_VERSION_HEX >= 0x030D0000 || defined(Py_GIL_DISABLED)
#error "versions of dicts are known of Python 3.11 and 3.12"
#endif

namespace {

enum Kind { kLocal, kGlobals, kDict, kItem, kAttribute, kType, kBases, kTypeDict, kIndex, kNth };
enum Needs { kValue = 1, kContents = 2, kTensor = 4, kOrder = 8, kLacks = 16 };

constexpr size_t kMostRecords = 32;
constexpr uint64_t kTrials = 32;         // walks before it is asked whether remembering pays
constexpr uint64_t kHitsPerWalk = 4;     // that is when it does
constexpr unsigned kChangesOfDict = 2;   // after so many, the items that count are compared instead of its version

// A reference that is held as long as this lives.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  static Ref to(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Ref(borrowed);
  }
  PyObject* get() const { return object_; }
  PyObject* take() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

struct Step {
  Py_ssize_t parent;
  Kind kind;
  Ref key;
  Py_ssize_t index;
  int needs;
  bool used = true;
  unsigned changes = 0;  // of the dict that it leads to
};

enum FactKind : uint8_t { kWord, kHalfWord, kItemIs, kLocalIs, kTensorIs };

struct Fact {
  FactKind kind;
  uint32_t step;
  const void* place;  // of a word; a dict; a tensor's TensorImpl
  uint64_t value;     // of a word; the item's address; the position among `tensors`
};

// What guards compare of a tensor.
struct TensorFact {
  uint64_t keys;
  caffe2::TypeMeta dtype;
  c10::Device device;
  bool requires_grad;
  std::vector<int64_t> sizes, strides;
};

struct Record {
  std::vector<Fact> facts;
  std::vector<TensorFact> tensors;
  std::vector<Ref> kept;
  std::vector<uint64_t> apart;  // sorted addresses of tensors
  uint64_t included = 0, excluded = 0;  // this thread's dispatch keys, which guards apply to those of tensors
};

// A value that a step leads to. `loose`: it is known by its address only. `by_version`: a dict whose version is a fact.
struct Place {
  PyObject* value = nullptr;  // borrowed: no Python code runs during a walk
  bool loose = true, by_version = false;
};

// A local, or an item of the tuple that it is.
struct Argument {
  Ref name;
  Py_ssize_t index;  // -1 for the local itself
};

struct Body {
  Ref check, globals;
  std::vector<Step> steps;
  std::vector<Py_ssize_t> apart;  // steps to tensors that are none of these arguments
  std::vector<Argument> arguments;
  std::vector<Record> records;
  std::vector<Place> places;   // of the steps, as long as these are added
  std::vector<Ref> examples;   // the same values, held
  Ref locals;                  // of the frame they are added for
  uint64_t hits = 0, walks = 0;
  Py_ssize_t changed = -1;  // the step of the fact that did not hold last
  bool off = false;
};

struct Memory {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  Body* body;
};

PyObject *tensor_type, *parameter_type, *constant_types;
PyObject *name_code, *name_defaults, *name_kwdefaults, *name_closure, *name_contents, *name_fget, *name_class, *name_lookup, *name_missing;
PyObject *name_parameters, *name_buffers, *name_modules;
PyObject *lookup_of_modules, *code_of_lookup;  // `__getattr__` of torch.nn.Module, and its code
PyObject *plain_lookup, *module_lookup, *plain_class;  // `__getattribute__` of objects and of modules, `__class__` of objects

// A tensor as Python sees it, up to where its TensorImpl is.
struct PythonTensor {
  PyObject_HEAD
  c10::TensorImpl* impl;
};

c10::TensorImpl* impl_of(const PyObject* tensor) { return reinterpret_cast<const PythonTensor*>(tensor)->impl; }

bool is_plain_tensor(PyObject* x) {
  const PyObject* type = reinterpret_cast<const PyObject*>(Py_TYPE(x));
  return type == tensor_type || type == parameter_type;
}

uint64_t word_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// Whether the value can not change, and holds nothing that can.
bool is_constant(PyObject* x) {
  if (x == Py_None || x == Py_Ellipsis || PyBool_Check(x) || PyLong_CheckExact(x) || PyFloat_CheckExact(x) ||
      PyUnicode_CheckExact(x) || PyBytes_CheckExact(x) || PyComplex_CheckExact(x))
    return true;
  if (PyTuple_CheckExact(x)) {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(x); ++k)
      if (!is_constant(PyTuple_GET_ITEM(x, k))) return false;
    return true;
  }
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(constant_types); ++k)
    if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == PyTuple_GET_ITEM(constant_types, k)) return true;
  return false;
}

// Whether it has nothing that a path leads through: code, and functions and descriptors that are not Python's.
bool is_opaque(PyObject* x) {
  return PyCode_Check(x) || Py_TYPE(x) == &PyCFunction_Type || Py_TYPE(x) == &PyWrapperDescr_Type ||
         Py_TYPE(x) == &PyMethodDescr_Type || Py_TYPE(x) == &PyGetSetDescr_Type || Py_TYPE(x) == &PyMemberDescr_Type ||
         Py_TYPE(x) == &PyProperty_Type;
}

bool is_heap_type(const PyTypeObject* type) { return (type->tp_flags & Py_TPFLAGS_HEAPTYPE) != 0; }

bool is_data_descriptor(PyObject* x) { return Py_TYPE(x)->tp_descr_set != nullptr; }

// ------------------------------------------------------------------ a walk

class Walk {
 public:
  Walk(const Body* self, PyObject* locals, Record* out) : self_(self), locals_(locals), out_(out) {}

  // Whether all values can be remembered that used steps lead to.
  bool all() {
    const auto keys = c10::impl::tls_local_dispatch_key_set();
    out_->included = keys.included_.raw_repr();
    out_->excluded = keys.excluded_.raw_repr();
    for (const Step& step : self_->steps) {
      if (!step.used) {
        places_.emplace_back();
      } else if (!take(step)) {
        return false;
      }
    }
    for (const Py_ssize_t at : self_->apart) out_->apart.push_back(word_of(places_[at].value));
    std::sort(out_->apart.begin(), out_->apart.end());
    return true;
  }

  // Where a further step leads to, after those of `places`; without a value where that cannot be remembered.
  Place one(std::vector<Place> places, const Step& step) {
    places_ = std::move(places);
    return take(step) ? places_.back() : Place();
  }

 private:
  bool take(const Step& step) {
    at_ = static_cast<uint32_t>(places_.size());
    Place place;
    place.value = reach(step, &place.loose);
    if (place.value == nullptr || !describe(step, &place)) return false;
    places_.push_back(place);
    return true;
  }

  void word(const void* place, uint64_t value) {
    if (words_.insert(place).second) out_->facts.push_back({kWord, at_, place, value});
  }

  void pointer(PyObject* const* place, const PyObject* value) { word(place, word_of(value)); }

  void type_is(PyObject* x) { word(&x->ob_type, word_of(Py_TYPE(x))); }

  void version_of_dict(PyObject* dict) {
    const PyDictObject* known = reinterpret_cast<PyDictObject*>(dict);
    word(&known->ma_version_tag, known->ma_version_tag);
  }

  // A type with all its bases, by a version that is given once.
  bool version(PyTypeObject* type) {
    if (!is_heap_type(type)) return (type->tp_flags & Py_TPFLAGS_IMMUTABLETYPE) != 0;
    _PyType_Lookup(type, name_class);  // gives it a version
    if (type->tp_version_tag == 0 || (type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG) == 0) return false;
    if (words_.insert(&type->tp_version_tag).second)
      out_->facts.push_back({kHalfWord, at_, &type->tp_version_tag, type->tp_version_tag});
    return true;
  }

  // The value that the step leads to; null where that cannot be remembered.
  PyObject* reach(const Step& step, bool* loose) {
    if (step.kind == kLocal) {
      PyObject* value = PyDict_GetItemWithError(locals_, step.key.get());
      if (value != nullptr) out_->facts.push_back({kLocalIs, at_, step.key.get(), word_of(value)});
      return value;
    }
    if (step.kind == kGlobals) return self_->globals.get();
    const Place from = places_[step.parent];
    PyObject* parent = from.value;
    if (parent == nullptr) return nullptr;
    switch (step.kind) {
      case kDict: return dict_of(parent);
      case kItem:
        if (!PyDict_CheckExact(parent)) return nullptr;
        return item_of(parent, step.key.get(), from.by_version, loose);
      case kAttribute: return attribute_of(step, parent, loose);
      case kType:
        type_is(parent);
        return reinterpret_cast<PyObject*>(Py_TYPE(parent));
      case kBases:
        if (!PyType_Check(parent) || !version(reinterpret_cast<PyTypeObject*>(parent))) return nullptr;
        *loose = false;
        return reinterpret_cast<PyTypeObject*>(parent)->tp_mro;
      case kTypeDict:
        if (!PyType_Check(parent) || !is_heap_type(reinterpret_cast<PyTypeObject*>(parent))) return nullptr;
        if (!version(reinterpret_cast<PyTypeObject*>(parent))) return nullptr;
        *loose = false;
        return reinterpret_cast<PyTypeObject*>(parent)->tp_dict;
      case kNth: return from.by_version ? nth_of(parent, step.index, loose) : nullptr;
      case kIndex: return element_of(parent, step.index, from.loose, loose);
      default: return nullptr;
    }
  }

  PyObject* dict_of(PyObject* parent) {
    PyObject** slot = _PyObject_GetDictPtr(parent);  // from now on its attributes are in a dict
    if (slot == nullptr || *slot == nullptr || !PyDict_CheckExact(*slot)) return nullptr;
    pointer(slot, *slot);
    return *slot;
  }

  PyObject* item_of(PyObject* dict, PyObject* key, bool by_version, bool* loose) {
    if (!PyUnicode_CheckExact(key) && !PyLong_CheckExact(key)) return nullptr;
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr) return nullptr;
    if (by_version) {
      *loose = false;
    } else {
      item(dict, key, value);
    }
    return value;
  }

  void item(PyObject* dict, PyObject* key, PyObject* value) {
    out_->facts.push_back({kItemIs, at_, dict, word_of(value)});
    out_->facts.push_back({kItemIs, at_, key, 0});  // read along with it
  }

  PyObject* element_of(PyObject* parent, Py_ssize_t index, bool parent_is_loose, bool* loose) {
    if (PyTuple_CheckExact(parent)) {
      if (index < 0 || index >= PyTuple_GET_SIZE(parent)) return nullptr;
      PyObject** place = &reinterpret_cast<PyTupleObject*>(parent)->ob_item[index];
      if (parent_is_loose) pointer(place, *place);
      *loose = parent_is_loose;
      return *place;
    }
    if (!PyList_CheckExact(parent) || index < 0 || index >= PyList_GET_SIZE(parent)) return nullptr;
    PyObject** place = &reinterpret_cast<PyListObject*>(parent)->ob_item[index];
    pointer(place, *place);
    return *place;
  }

  // The value of a dict's item by its order, of which the version tells, too.
  PyObject* nth_of(PyObject* dict, Py_ssize_t index, bool* loose) {
    if (!PyDict_CheckExact(dict)) return nullptr;
    Py_ssize_t at = 0;
    PyObject *key, *value;
    for (Py_ssize_t k = 0; PyDict_Next(dict, &at, &key, &value); ++k)
      if (k == index) {
        *loose = false;
        return is_constant(key) ? value : nullptr;
      }
    return nullptr;
  }

  PyObject* slot(PyObject** place) {
    pointer(place, *place);
    return *place == nullptr ? Py_None : *place;
  }

  PyObject* attribute_of(const Step& step, PyObject* parent, bool* loose) {
    PyObject* name = step.key.get();
    if (PyFunction_Check(parent)) {
      PyFunctionObject* function = reinterpret_cast<PyFunctionObject*>(parent);
      if (equal(name, name_code)) return slot(&function->func_code);
      if (equal(name, name_defaults)) return slot(&function->func_defaults);
      if (equal(name, name_kwdefaults)) return slot(&function->func_kwdefaults);
      if (equal(name, name_closure)) return slot(&function->func_closure);
      return nullptr;
    }
    if (PyCell_Check(parent)) {
      PyObject** place = &reinterpret_cast<PyCellObject*>(parent)->ob_ref;
      return equal(name, name_contents) && *place != nullptr ? slot(place) : nullptr;
    }
    if (Py_TYPE(parent) == &PyProperty_Type) {
      Ref value(equal(name, name_fget) ? PyObject_GetAttr(parent, name) : nullptr);
      PyErr_Clear();
      *loose = false;
      return value.get();  // which the property has for ever
    }
    if (PyType_Check(parent)) return attribute_of_type(reinterpret_cast<PyTypeObject*>(parent), name, loose);
    PyTypeObject* type = Py_TYPE(parent);
    const bool is_module = PyModule_CheckExact(parent);
    type_is(parent);
    if (!version(type) || _PyType_Lookup(type, name_lookup) != (is_module ? module_lookup : plain_lookup)) return nullptr;
    PyObject* in_class = _PyType_Lookup(type, name);
    if (in_class != nullptr && in_class == plain_class) return reinterpret_cast<PyObject*>(type);
    if (in_class != nullptr && is_data_descriptor(in_class)) return nullptr;
    PyObject* dict = is_module ? PyModule_GetDict(parent) : dict_of(parent);
    if (dict == nullptr) return nullptr;
    if (is_module) return item_of(dict, name, false, loose);
    PyObject* value = PyDict_GetItemWithError(dict, name);
    if (step.changes < kChangesOfDict) {
      version_of_dict(dict);
      *loose = false;
    } else {
      item(dict, name, value);
    }
    if (value != nullptr) return value;
    *loose = false;
    return in_class != nullptr && Py_TYPE(in_class)->tp_descr_get == nullptr ? in_class : nullptr;
  }

  PyObject* attribute_of_type(PyTypeObject* type, PyObject* name, bool* loose) {
    PyTypeObject* meta = Py_TYPE(type);
    if (meta->tp_getattro != PyType_Type.tp_getattro) return nullptr;
    type_is(reinterpret_cast<PyObject*>(type));
    if (!version(meta) || !version(type)) return nullptr;
    PyObject* in_meta = _PyType_Lookup(meta, name);
    if (in_meta != nullptr && is_data_descriptor(in_meta)) return nullptr;
    PyObject* value = _PyType_Lookup(type, name);
    if (value == nullptr || (!PyFunction_Check(value) && Py_TYPE(value)->tp_descr_get != nullptr)) return nullptr;
    *loose = false;
    return value;
  }

  static bool equal(PyObject* name, PyObject* other) { return PyUnicode_Compare(name, other) == 0; }

  // What makes sure that it is the same value, and what guards say of it.
  bool describe(const Step& step, Place* place) {
    PyObject* value = place->value;
    const bool loose = place->loose;
    if ((step.needs & kLacks) && !attributes_of(value)) return false;
    if (is_constant(value)) {
      if (loose) out_->kept.push_back(Ref::to(value));
      return (step.needs & kTensor) == 0;
    }
    if (step.needs & kValue) return false;
    if (loose || is_heap_type(Py_TYPE(value)) || PyModule_Check(value)) type_is(value);
    if (is_plain_tensor(value)) return (step.needs & kContents) == 0 && add_tensor(value);
    if (step.needs & kTensor) return false;
    if (PyDict_CheckExact(value) || (PyODict_CheckExact(value) && !(step.needs & kOrder))) {
      place->by_version = step.kind != kGlobals && ((step.needs & (kContents | kOrder)) || step.changes < kChangesOfDict);
      if (place->by_version) version_of_dict(value);
      return true;
    }
    if (PyTuple_CheckExact(value)) {
      if (loose) word(&reinterpret_cast<PyVarObject*>(value)->ob_size, PyTuple_GET_SIZE(value));
      return true;
    }
    if (PyList_CheckExact(value)) {
      const PyListObject* list = reinterpret_cast<PyListObject*>(value);
      word(&list->ob_base.ob_size, PyList_GET_SIZE(value));
      word(&list->ob_item, word_of(list->ob_item));
      return true;
    }
    if (step.needs & (kContents | kOrder)) return false;
    if (PyType_Check(value)) return !loose || version(reinterpret_cast<PyTypeObject*>(value));
    if (is_opaque(value)) {
      if (loose) out_->kept.push_back(Ref::to(value));
      return true;
    }
    return !loose || PyFunction_Check(value) || PyCell_Check(value) || PyModule_Check(value) || is_heap_type(Py_TYPE(value));
  }

  // Which attributes it has: an object with a dict, or a module of torch.nn, which has three more.
  bool attributes_of(PyObject* x) {
    PyTypeObject* type = Py_TYPE(x);
    if (!is_heap_type(type) || is_plain_tensor(x)) return false;
    type_is(x);
    if (!version(type) || _PyType_Lookup(type, name_lookup) != plain_lookup) return false;
    PyObject* dict = dict_of(x);
    if (dict == nullptr) return false;
    version_of_dict(dict);
    PyObject* last_resort = _PyType_Lookup(type, name_missing);
    if (last_resort == nullptr) return true;
    if (last_resort != lookup_of_modules) return false;
    pointer(&reinterpret_cast<PyFunctionObject*>(last_resort)->func_code, code_of_lookup);
    for (PyObject* name : {name_parameters, name_buffers, name_modules}) {
      PyObject* more = PyDict_GetItemWithError(dict, name);
      if (more == nullptr || !PyDict_CheckExact(more)) return false;
      version_of_dict(more);
    }
    return true;
  }

  bool add_tensor(PyObject* tensor) {
    const c10::TensorImpl* x = impl_of(tensor);
    if (x == nullptr || x->has_symbolic_sizes_strides() || x->layout() != c10::kStrided) return false;
    PyObject** attributes = _PyObject_GetDictPtr(tensor);  // where marks of dynamic sizes would be
    if (attributes == nullptr) return false;
    pointer(attributes, *attributes);
    if (*attributes != nullptr) version_of_dict(*attributes);
    word(&reinterpret_cast<PythonTensor*>(tensor)->impl, word_of(x));
    out_->facts.push_back({kTensorIs, at_, x, out_->tensors.size()});
    out_->tensors.push_back(
        {x->key_set().raw_repr(), x->dtype(), x->device(), x->requires_grad(), x->sizes().vec(), x->strides().vec()});
    return true;
  }

  const Body* self_;
  PyObject* locals_;
  Record* out_;
  uint32_t at_ = 0;
  std::vector<Place> places_;
  std::set<const void*> words_;
};

// ------------------------------------------------------------------ a check

bool is_like(const c10::TensorImpl* x, const TensorFact& fact) {
  return x->key_set().raw_repr() == fact.keys && x->dtype() == fact.dtype && x->device() == fact.device &&
         x->requires_grad() == fact.requires_grad && x->sizes().equals(fact.sizes) && x->strides().equals(fact.strides);
}

// Null when all facts hold, else the first that does not.
const Fact* broken(const Body* self, const Record& record, PyObject* locals) {
  const std::vector<Fact>& facts = record.facts;
  for (size_t k = 0; k < facts.size(); ++k) {
    const Fact& fact = facts[k];
    bool holds = false;
    switch (fact.kind) {
      case kWord: holds = *static_cast<const uint64_t*>(fact.place) == fact.value; break;
      case kHalfWord: holds = *static_cast<const uint32_t*>(fact.place) == fact.value; break;
      case kItemIs: {
        PyObject* key = static_cast<PyObject*>(const_cast<void*>(facts[++k].place));
        holds = word_of(PyDict_GetItemWithError(static_cast<PyObject*>(const_cast<void*>(fact.place)), key)) == fact.value;
        break;
      }
      case kLocalIs:
        holds = word_of(PyDict_GetItemWithError(locals, static_cast<PyObject*>(const_cast<void*>(fact.place)))) == fact.value;
        break;
      case kTensorIs: holds = is_like(static_cast<const c10::TensorImpl*>(fact.place), record.tensors[fact.value]); break;
    }
    if (!holds) return &fact;
  }
  static const Fact in_locals{kLocalIs, 0, nullptr, 0};
  for (const Argument& one : self->arguments) {
    PyObject* x = PyDict_GetItemWithError(locals, one.name.get());
    if (x != nullptr && one.index >= 0) {
      if (!PyTuple_CheckExact(x) || one.index >= PyTuple_GET_SIZE(x)) return &in_locals;
      x = PyTuple_GET_ITEM(x, one.index);
    }
    if (std::binary_search(record.apart.begin(), record.apart.end(), word_of(x))) return &in_locals;
  }
  return nullptr;
}

bool has_these_keys(const Record& record) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return record.included == keys.included_.raw_repr() && record.excluded == keys.excluded_.raw_repr();
}

// Guards decide, and what they have let pass is remembered: what was seen before, if it is the same after them.
PyObject* ask(Body* self, PyObject* locals) {
  Record seen;
  self->walks += 1;
  const bool known = Walk(self, locals, &seen).all();
  PyErr_Clear();
  Ref answer(PyObject_CallOneArg(self->check.get(), locals));
  if (answer.get() != Py_True || !known || !has_these_keys(seen) || broken(self, seen, locals) != nullptr) return answer.take();
  Record last;  // let go of at the end, when all is as it shall be
  if (self->records.size() >= kMostRecords) {
    last = std::move(self->records.back());
    self->records.pop_back();
  }
  self->records.insert(self->records.begin(), std::move(seen));
  return answer.take();
}

PyObject* look(Body* self, PyObject* locals) {
  if (self->off) return PyObject_CallOneArg(self->check.get(), locals);
  Record outdated;
  for (size_t k = 0; k < self->records.size(); ++k) {
    if (!has_these_keys(self->records[k])) continue;
    const Fact* fact = broken(self, self->records[k], locals);
    if (fact == nullptr) {
      self->hits += 1;
      if (k > 0) std::swap(self->records[k], self->records[k - 1]);
      Py_RETURN_TRUE;
    }
    if (fact->kind == kLocalIs) continue;  // another model's
    self->steps[fact->step].changes += 1;
    self->changed = fact->step;
    outdated = std::move(self->records[k]);
    self->records.erase(self->records.begin() + static_cast<std::ptrdiff_t>(k));
    break;
  }
  self->off = self->walks >= kTrials && self->hits < kHitsPerWalk * self->walks;
  return self->off ? PyObject_CallOneArg(self->check.get(), locals) : ask(self, locals);
}

PyObject* check(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  Body* self = reinterpret_cast<Memory*>(object)->body;
  if (PyVectorcall_NARGS(flags) != 1 || names != nullptr || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "a frame's locals are wanted");
    return nullptr;
  }
  try {
    return look(self, args[0]);
  } catch (const std::exception&) {  // of a tensor that is not what it seems
    return PyObject_CallOneArg(self->check.get(), args[0]);
  }
}

// ------------------------------------------------------------------ making one

PyObject* add(PyObject* object, PyObject* args) {
  Body* self = reinterpret_cast<Memory*>(object)->body;
  Py_ssize_t parent;
  int kind, needs;
  PyObject* key;
  if (!PyArg_ParseTuple(args, "niOi", &parent, &kind, &key, &needs)) return nullptr;
  const Py_ssize_t count = static_cast<Py_ssize_t>(self->steps.size());
  if (!self->locals || kind < kLocal || kind > kNth || parent >= count || (kind > kGlobals && parent < 0)) {
    PyErr_SetString(PyExc_ValueError, "there is no such step");
    return nullptr;
  }
  Step step{parent, static_cast<Kind>(kind), Ref::to(key), 0, needs};
  if (kind == kIndex || kind == kNth) {
    step.index = PyLong_AsSsize_t(key);
    if (PyErr_Occurred()) return nullptr;
  } else if (kind == kLocal || kind == kAttribute) {
    if (!PyUnicode_CheckExact(key)) Py_RETURN_NONE;
  }
  Record found;
  Place place;
  try {
    place = Walk(self, self->locals.get(), &found).one(self->places, step);
  } catch (const std::exception&) {
    place.value = nullptr;
  }
  PyErr_Clear();
  if (place.value == nullptr) Py_RETURN_NONE;
  self->places.push_back(place);
  self->examples.push_back(Ref::to(place.value));
  self->steps.push_back(std::move(step));
  return Py_BuildValue("nO", count, Py_TYPE(place.value));
}

bool read_steps(const Body* self, PyObject* numbers, std::vector<Py_ssize_t>* out) {
  Ref items(PySequence_Fast(numbers, "steps come in sequences"));
  if (!items) return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(items.get()); ++k) {
    const Py_ssize_t at = PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(items.get(), k));
    if (PyErr_Occurred()) return false;
    if (at < 0 || at >= static_cast<Py_ssize_t>(self->steps.size())) {
      PyErr_SetString(PyExc_ValueError, "there is no such step");
      return false;
    }
    out->push_back(at);
  }
  return true;
}

PyObject* seal(PyObject* object, PyObject* args) {
  Body* self = reinterpret_cast<Memory*>(object)->body;
  PyObject *used, *apart, *arguments;
  if (!PyArg_ParseTuple(args, "OOO!", &used, &apart, &PyTuple_Type, &arguments)) return nullptr;
  std::vector<Py_ssize_t> ends;
  if (!read_steps(self, used, &ends) || !read_steps(self, apart, &self->apart)) return nullptr;
  ends.insert(ends.end(), self->apart.begin(), self->apart.end());
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(arguments); ++k) {
    PyObject* name;
    Py_ssize_t index;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(arguments, k), "Un", &name, &index)) return nullptr;
    self->arguments.push_back({Ref::to(name), index});
  }
  for (Step& step : self->steps) step.used = false;
  for (Py_ssize_t at : ends)
    for (; at >= 0 && !self->steps[at].used; at = self->steps[at].parent) self->steps[at].used = true;
  self->places.clear();
  std::vector<Ref> examples = std::exchange(self->examples, {});
  Ref locals = std::move(self->locals);
  Py_RETURN_NONE;
}

PyObject* state(PyObject* object, PyObject*) {
  const Body* self = reinterpret_cast<Memory*>(object)->body;
  size_t facts = 0;
  for (const Record& record : self->records) facts += record.facts.size();
  return Py_BuildValue(
      "{sKsKsnsnsnsO}", "hits", self->hits, "walks", self->walks, "changed", self->changed, "records", static_cast<Py_ssize_t>(self->records.size()), "facts",
      static_cast<Py_ssize_t>(facts), "off", self->off ? Py_True : Py_False);
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* names) {
  PyObject *asked, *locals, *globals;
  if (names != nullptr && PyDict_GET_SIZE(names) != 0) {
    PyErr_SetString(PyExc_TypeError, "it takes no arguments by name");
    return nullptr;
  }
  if (!PyArg_ParseTuple(args, "OO!O!", &asked, &PyDict_Type, &locals, &PyDict_Type, &globals)) return nullptr;
  Ref object(type->tp_alloc(type, 0));
  if (!object) return nullptr;
  Memory* made = reinterpret_cast<Memory*>(object.get());
  made->vectorcall = check;
  made->body = new Body;
  made->body->check = Ref::to(asked);
  made->body->locals = Ref::to(locals);
  made->body->globals = Ref::to(globals);
  return object.take();
}

void unmake(PyObject* object) {
  delete reinterpret_cast<Memory*>(object)->body;
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"add", add, METH_VARARGS,
     "add(parent, kind, key, needs): a step from the value of another one, or -1. Its number and its value's type, or None."},
    {"seal", seal, METH_VARARGS,
     "seal(used, apart, arguments): no more steps; those that are used, and what leads to them, are walked. The steps `apart` lead"
     " to tensors that are none of the arguments, pairs of a local's name and -1 or an index."},
    {"state", state, METH_NOARGS, "Counts, for tests and benchmarks."},
    {nullptr, nullptr, 0, nullptr}};

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Memory, vectorcall), READONLY, nullptr}, {nullptr, 0, 0, 0, nullptr}};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(unmake)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, nullptr}};

PyType_Spec spec = {
    "fxopt_guards.Memory", sizeof(Memory), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fxopt_guards", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

// Whether tensors hold their TensorImpl where PythonTensor says: `_cdata` is torch's own word for it.
bool is_layout_known(PyObject* torch) {
  for (PyObject* type : {tensor_type, parameter_type}) {
    Ref plain(PyObject_CallMethod(torch, "empty", "i", 3));
    Ref tensor(plain ? PyObject_CallOneArg(type, plain.get()) : nullptr);
    Ref told(tensor ? PyObject_GetAttrString(tensor.get(), "_cdata") : nullptr);
    if (!told) return false;
    const bool roomy = static_cast<size_t>(Py_TYPE(tensor.get())->tp_basicsize) >= sizeof(PythonTensor);
    if (!roomy || PyLong_AsVoidPtr(told.get()) != impl_of(tensor.get())) {
      PyErr_SetString(PyExc_ImportError, "tensors of this torch hold their memory elsewhere");
      return false;
    }
  }
  return true;
}

}  // namespace

PyMODINIT_FUNC PyInit_fxopt_guards() {
  Ref torch(PyImport_ImportModule("torch"));
  if (!torch) return nullptr;
  Ref nn(PyObject_GetAttrString(torch.get(), "nn"));
  if (!nn) return nullptr;
  // Held as long as the process lives, as the module is.
  tensor_type = PyObject_GetAttrString(torch.get(), "Tensor");
  parameter_type = PyObject_GetAttrString(nn.get(), "Parameter");
  constant_types = PyTuple_New(5);
  if (tensor_type == nullptr || parameter_type == nullptr || constant_types == nullptr) return nullptr;
  Py_ssize_t count = 0;
  for (const char* name : {"dtype", "device", "layout", "memory_format", "Size"}) {
    PyObject* type = PyObject_GetAttrString(torch.get(), name);
    if (type == nullptr) return nullptr;
    PyTuple_SET_ITEM(constant_types, count++, type);
  }
  name_code = PyUnicode_InternFromString("__code__");
  name_defaults = PyUnicode_InternFromString("__defaults__");
  name_kwdefaults = PyUnicode_InternFromString("__kwdefaults__");
  name_closure = PyUnicode_InternFromString("__closure__");
  name_contents = PyUnicode_InternFromString("cell_contents");
  name_fget = PyUnicode_InternFromString("fget");
  name_class = PyUnicode_InternFromString("__class__");
  name_lookup = PyUnicode_InternFromString("__getattribute__");
  name_missing = PyUnicode_InternFromString("__getattr__");
  name_parameters = PyUnicode_InternFromString("_parameters");
  name_buffers = PyUnicode_InternFromString("_buffers");
  name_modules = PyUnicode_InternFromString("_modules");
  for (PyObject* name : {name_code, name_defaults, name_kwdefaults, name_closure, name_contents, name_fget, name_class, name_lookup,
                         name_missing, name_parameters, name_buffers, name_modules})
    if (name == nullptr) return nullptr;
  plain_lookup = _PyType_Lookup(&PyBaseObject_Type, name_lookup);
  module_lookup = _PyType_Lookup(&PyModule_Type, name_lookup);
  Ref module_type(PyObject_GetAttrString(nn.get(), "Module"));
  if (!module_type) return nullptr;
  lookup_of_modules = PyObject_GetAttr(module_type.get(), name_missing);
  if (lookup_of_modules == nullptr || !PyFunction_Check(lookup_of_modules)) return nullptr;
  code_of_lookup = PyFunction_GET_CODE(lookup_of_modules);
  plain_class = _PyType_Lookup(&PyBaseObject_Type, name_class);
  if (!is_layout_known(torch.get())) return nullptr;
  Ref type(PyType_FromSpec(&spec));
  Ref module(PyModule_Create(&definition));
  if (!type || !module || PyModule_AddObjectRef(module.get(), "Memory", type.get()) != 0) return nullptr;
  return module.take();
}
