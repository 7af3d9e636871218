# glibc 2.34 moved libdl, libpthread and librt into libc and gave their functions a new version, so that what is linked
# beside it would not load beside an older glibc. The old versions are still there. rf_link_old_glibc(TARGET) links against
# libraries with nothing but their names and versions, as an older system has them: at run time glibc's own are taken.
# `auditwheel show` (tests/test_wheel.py) says whether that is all of them.
set(RF_GLIBC_dl_SONAME libdl.so.2)
set(RF_GLIBC_dl dlclose dlerror dlopen dlsym dlvsym)
set(RF_GLIBC_dl_2.3.4 dlmopen)
set(RF_GLIBC_rt_SONAME librt.so.1)
set(RF_GLIBC_rt shm_open shm_unlink)
set(RF_GLIBC_pthread_SONAME libpthread.so.0)
set(RF_GLIBC_pthread
    pthread_condattr_setpshared
    pthread_create
    pthread_detach
    pthread_getspecific
    pthread_join
    pthread_key_create
    pthread_key_delete
    pthread_kill
    pthread_mutex_trylock
    pthread_mutexattr_destroy
    pthread_mutexattr_init
    pthread_mutexattr_setpshared
    pthread_mutexattr_settype
    pthread_once
    pthread_rwlock_destroy
    pthread_rwlock_init
    pthread_rwlock_rdlock
    pthread_rwlock_timedrdlock
    pthread_rwlock_timedwrlock
    pthread_rwlock_tryrdlock
    pthread_rwlock_trywrlock
    pthread_rwlock_unlock
    pthread_rwlock_wrlock
    pthread_rwlockattr_destroy
    pthread_rwlockattr_init
    pthread_rwlockattr_setpshared
    pthread_setspecific
    pthread_spin_destroy
    pthread_spin_init
    pthread_spin_lock
    pthread_spin_trylock
    pthread_spin_unlock
    sem_destroy
    sem_init
    sem_post
    sem_timedwait
    sem_trywait
    sem_wait)

function(rf_link_old_glibc target)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
    return()
  endif()
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/glibc)
  foreach(name dl rt pthread)
    set(source "")
    foreach(function IN LISTS RF_GLIBC_${name} RF_GLIBC_${name}_2.3.4)
      string(APPEND source "extern \"C\" void ${function}() {}\n")
    endforeach()
    list(JOIN RF_GLIBC_${name} "; " functions)
    set(versions "GLIBC_2.2.5 { ${functions}; };\n")
    if(RF_GLIBC_${name}_2.3.4)
      string(APPEND versions "GLIBC_2.3.4 { ${RF_GLIBC_${name}_2.3.4}; } GLIBC_2.2.5;\n")
    endif()
    file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "${source}" @ONLY)
    file(CONFIGURE OUTPUT ${folder}/${name}.map CONTENT "${versions}" @ONLY)
    add_library(rf_old_${name} SHARED ${folder}/${name}.cpp)
    target_compile_options(rf_old_${name} PRIVATE -w -fno-builtin -fvisibility=default)
    target_link_options(rf_old_${name} PRIVATE -nodefaultlibs -Wl,--version-script=${folder}/${name}.map
                        -Wl,-soname,${RF_GLIBC_${name}_SONAME})
    set_target_properties(rf_old_${name} PROPERTIES OUTPUT_NAME ${name} NO_SONAME ON LIBRARY_OUTPUT_DIRECTORY ${folder})
  endforeach()
  target_sources(${target} PRIVATE csrc/host/glibc.cpp)
  target_link_libraries(${target} PRIVATE -Wl,--as-needed rf_old_dl rf_old_rt rf_old_pthread -Wl,--no-as-needed)
endfunction()
