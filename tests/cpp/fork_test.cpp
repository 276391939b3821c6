// Descriptors and locks across fork(): a data loader's worker must not keep what was its parent's.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <functional>

#include "cpp/descriptor.h"
#include "cpp/run_directory.h"
#include "tests/cpp/temp_dir.h"

namespace pccheck::test {
namespace {

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

int open_null() { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }

// A forked child that runs `body`, whose result is its exit status.
class Child {
 public:
  explicit Child(const std::function<int()>& body) : pid_(::fork()) {
    if (pid_ == 0) ::_exit(body());
  }
  ~Child() { status(); }
  int status() {
    int status = 0;
    if (pid_ > 0 && ::waitpid(pid_, &status, 0) == pid_) {
      pid_ = -1;
      status_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    }
    return status_;
  }

 private:
  pid_t pid_;
  int status_ = -1000;
};

TEST(Descriptor, IsClosedAtTheEndOfItsOwner) {
  int number = -1;
  {
    Descriptor first(open_null());
    number = first.get();
    ASSERT_TRUE(is_open(number));
    Descriptor second(std::move(first));
    EXPECT_FALSE(first);
    EXPECT_EQ(second.get(), number);
    Descriptor third(open_null());
    const int replaced = third.get();
    third = std::move(second);
    EXPECT_FALSE(is_open(replaced));
    EXPECT_TRUE(is_open(number));
  }
  EXPECT_FALSE(is_open(number));
  Descriptor none(-1);
  EXPECT_FALSE(none);
  none.reset();
}

TEST(Descriptor, IsClosedInAForkedChildAndLeftOpenInTheParent) {
  const Descriptor ours(open_null());
  const Descriptor also_ours(open_null());
  const int foreign = open_null();
  Child child([&] {
    if (is_open(ours.get()) || is_open(also_ours.get())) return 1;
    return is_open(foreign) ? 0 : 2;
  });
  EXPECT_EQ(child.status(), 0) << "1: ours is open in the child, 2: somebody else's is not";
  EXPECT_TRUE(is_open(ours.get()));
  ::close(foreign);
}

TEST(Descriptor, AChildsDestructorsCloseNothingThatIsNotTheirs) {
  Descriptor ours(open_null());
  Child child([&] {
    const int number = ours.get();
    if (::dup2(STDERR_FILENO, number) != number) return 1;  // the number is somebody else's now
    ours.reset();
    return is_open(number) ? 0 : 2;
  });
  EXPECT_EQ(child.status(), 0);
}

TEST(Descriptor, ALockIsFreeWhenTheParentLetsGoThoughAChildLives) {
  const TempDir temp;
  const auto open_run = [&] {
    return open_run_directory(temp.path(), {.keep_last = 0, .max_spares = 0},
                              std::chrono::seconds(0), [] {});
  };
  std::unique_ptr<RunDirectory> run = open_run();
  const std::unique_ptr<RunDirectory::Partial> partial =
      std::make_unique<RunDirectory::Partial>(run->prepare("step-00000001"));
  const std::unique_ptr<File> file = partial->directory->create_file("model.safetensors");
  std::array<int, 2> alive{}, end{};
  ASSERT_EQ(::pipe(alive.data()), 0);
  ASSERT_EQ(::pipe(end.data()), 0);
  Child child([&] {
    char byte = 1;
    if (::write(alive[1], &byte, 1) != 1) return 1;
    return ::read(end[0], &byte, 1) == 1 ? 0 : 2;
  });
  char byte = 0;
  ASSERT_EQ(::read(alive[0], &byte, 1), 1);
  EXPECT_THROW(open_run(), std::runtime_error) << "the parent still holds it";
  run.reset();
  EXPECT_NO_THROW(open_run());
  ASSERT_EQ(::write(end[1], &byte, 1), 1);
  EXPECT_EQ(child.status(), 0);
  for (const int fd : {alive[0], alive[1], end[0], end[1]}) ::close(fd);
}

}  // namespace
}  // namespace pccheck::test
