// What is thrown inside the library; api.cpp turns it into a code and a text.
#pragma once
#include <stdexcept>
#include <string>

#include "../include/tinyvit.h"

namespace tinyvit {

struct Error : std::runtime_error {
  tinyvit_status status;
  Error(tinyvit_status s, const std::string& text) : std::runtime_error(text), status(s) {}
};

}  // namespace tinyvit
