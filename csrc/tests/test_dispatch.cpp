// The choice of the instruction set. A wrong E2CM_ISA is an exception that names the available ones, never an abort.
#include <algorithm>
#include <stdexcept>

#include "data.h"

using namespace e2cm;
using namespace e2cm::test;

TEST(requested_isa_is_used) {
  const char* const wanted = std::getenv("E2CM_ISA");
  if (wanted) CHECK(std::string(wanted) == isa_in_use());
  const std::vector<std::string> all = levels();
  CHECK(std::count(all.begin(), all.end(), isa_in_use()) == 1);
  CHECK(all.back() == "scalar");
}

#ifndef _WIN32
int main() {
  const auto names_the_available = [](const auto& call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      const std::string text = error.what();
      return text.find("vax") != std::string::npos && text.find(isa_available()) != std::string::npos ? 0 : 2;
    }
    return 3;
  };
  bool failed = false;
  const auto expect = [&](const char* what, int status) {
    if (status != 0) std::printf("E2CM_ISA=vax, %s: status %d\n", what, status), failed = true;
  };
  expect("isa_in_use", in_child("vax", [&] { return names_the_available([] { isa_in_use(); }); }));
  for (const int threads : {1, 4}) {  // enough work for all threads
    const auto call = [threads] {
      const Problem problem(64, 100, 4096);
      const Exact<float> out(64 * 100);
      class_distances(problem.x.view(), problem.head(), out.data(), threads);
    };
    const std::string what = "the first call is class_distances with threads = " + std::to_string(threads);
    expect(what.c_str(), in_child("vax", [&] { return names_the_available(call); }));
  }
  const std::string best = levels().front();
  expect("set, but empty", in_child("", [&] { return isa_in_use() == best ? 0 : 4; }));
  return run_tests() || failed;
}
#else
int main() { return run_tests(); }
#endif
